"""An embedding cut over the vocabulary equals torch's on the whole, and its gradient."""

import pytest
import torch
import torch.distributed as dist
from distributed import run_distributed
from torch import Tensor

from megatsp.comm import Comm
from megatsp.tp.embedding import embed_vocabulary_parallel
from megatsp.tp.tokens import GroupTokens

B, T, H, V = 3, 5, 4, 13  # T: of one rank; 13 rows are 4, 4, 4, 1


def inputs(size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids (many of them twice), the whole matrix, and the gradient of the output."""
    generator = torch.Generator().manual_seed(size)
    ids = torch.randint(0, V, (B, T * size), generator=generator)
    ids[0, :3] = torch.tensor([0, V - 1, V - 1])
    weight = torch.randn(V, H, generator=generator)
    return ids, weight, torch.randint(-9, 10, (B, T * size, H), generator=generator).float()


def rank_embed(dtype: torch.dtype) -> None:
    comm = Comm(dist.group.WORLD)
    ids, whole, dout = inputs(comm.size)
    reference = whole.clone().requires_grad_()
    expected = torch.nn.functional.embedding(ids, reference)
    expected.backward(dout)

    chunk = -(-V // comm.size)
    rows = slice(chunk * comm.rank, chunk * (comm.rank + 1))
    weight = whole[rows].clone().requires_grad_()
    tokens = GroupTokens(comm)
    found = embed_vocabulary_parallel(tokens.own(ids), weight, tokens, rows.start, dtype)
    assert found.dtype == dtype and torch.equal(found, tokens.own(expected).to(dtype))
    found.backward(tokens.own(dout).to(dtype))
    assert torch.equal(weight.grad, reference.grad[rows])
    others = (comm.size - 1) * B * T
    assert comm.traffic.elements == (
        {"embedding/ids": others, "embedding/forward": others * H, "embedding/backward": others * H}
        if comm.size > 1
        else {}
    )


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lookup_and_gradient(size, dtype):
    run_distributed(rank_embed, size, dtype)
