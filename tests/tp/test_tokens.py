"""A tp group's tokens are gathered, summed and scattered as if one rank had them all."""

import pytest
import torch
import torch.distributed as dist
from distributed import run_distributed
from torch import Tensor

from megatsp.comm import Comm
from megatsp.tp.tokens import GroupTokens

B, T, H, V = 3, 5, 4, 11  # T: of one rank


def drawn(rank: int, *shape: int) -> Tensor:
    """A rank's own: small integers, so that sums are exact."""
    return torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(rank)).float()


def rank_tokens() -> None:
    comm = Comm(dist.group.WORLD)
    tokens, size = GroupTokens(comm), comm.size
    for tail in ((), (H,), (2, H)):  # labels, the residual stream, anything behind it
        whole = torch.cat([drawn(rank, B, T, *tail) for rank in range(size)], 1)
        own = drawn(comm.rank, B, T, *tail)
        assert torch.equal(tokens.gather(own, "there").wait(), whole)
        assert torch.equal(tokens.own(whole), own)
        total = sum(drawn(rank, B, T * size, *tail) for rank in range(size))
        back = tokens.reduce_scatter(drawn(comm.rank, B, T * size, *tail), "back").wait()
        assert torch.equal(back, total[:, T * comm.rank : T * (comm.rank + 1)])
        assert not back._is_view() and back.is_contiguous()
    elements = (size - 1) * B * T * (1 + H + 2 * H)
    assert comm.traffic.elements == ({"there": elements, "back": elements} if size > 1 else {})


def rank_combine() -> None:
    """Log-sum-exp and target logits over shares of the vocabulary that differ in size."""
    comm = Comm(dist.group.WORLD)
    generator = torch.Generator().manual_seed(0)
    logits = 30 * torch.randn(8, V, generator=generator)
    targets = torch.arange(8) % V
    chunk = -(-V // comm.size)
    first = chunk * comm.rank
    share = logits[:, first : first + chunk]
    inside = (targets >= first) & (targets < first + share.shape[1])
    target = torch.where(inside, logits.gather(1, targets[:, None])[:, 0], 0)
    lse, target = GroupTokens(comm).combine(share.logsumexp(1), target)
    torch.testing.assert_close(lse, logits.logsumexp(1), rtol=1e-6, atol=1e-6)
    assert torch.equal(target, logits.gather(1, targets[:, None])[:, 0])
    assert comm.traffic.elements == ({"head/loss": (comm.size - 1) * 2 * 8} if comm.size > 1 else {})


@pytest.mark.parametrize("size", [1, 2, 4])
def test_gather_and_reduce_scatter(size):
    run_distributed(rank_tokens, size)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_combine_is_the_log_sum_exp_of_the_whole_vocabulary(size):
    run_distributed(rank_combine, size)


def test_a_group_of_one_copies_nothing():
    tokens, x = GroupTokens(Comm(None)), torch.zeros(B, T, H)
    for pending in (tokens.gather(x, "there"), tokens.reduce_scatter(x, "back")):
        assert pending.wait() is x
