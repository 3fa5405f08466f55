"""Gradients of what is whole on every rank of a tp group are summed; those of cut biases are not."""

import pytest
import torch
import torch.distributed as dist
from distributed import run_distributed
from torch import Tensor

from megatsp.comm import Comm
from megatsp.tp.small import ReplicatedGains
from megatsp.tsp.attention import HeadVectors

H, D = 5, 4


def drawn(rank: int) -> list[Tensor]:
    """Gradients on a rank: two norm gains [h], biases of q, k, v, head gains of q and k [d]."""
    generator = torch.Generator().manual_seed(rank)
    sizes = (H, H, 3 * D, D, D, D, D)
    return [torch.randint(-9, 10, (n,), generator=generator).float() for n in sizes]


def rank_reduce(biased: bool, head_normed: bool) -> None:
    comm = Comm(dist.group.WORLD)
    small, mine = ReplicatedGains(comm), drawn(comm.rank)
    total = [sum(of_rank) for of_rank in zip(*(drawn(r) for r in range(comm.size)), strict=True)]
    vectors = mine[2:5] * biased + mine[5:] * head_normed
    dgains, dvectors = small.reduce(mine[:2], HeadVectors.of(vectors, biased, head_normed))()
    expected = [*total[:2], *mine[2:5] * biased, *total[5:] * head_normed]
    assert len(dgains) == 2
    for found, wanted in zip([*dgains, *dvectors], expected, strict=True):
        assert found.dtype == torch.float32 and torch.equal(found, wanted)
    summed = 2 * H + 2 * D * head_normed
    moved = 2 * (summed * (comm.size - 1) // comm.size)
    assert comm.traffic.elements == ({"small": moved} if comm.size > 1 else {})


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(
    ("biased", "head_normed"), [(False, False), (True, False), (False, True), (True, True)]
)
def test_reduce(size, biased, head_normed):
    run_distributed(rank_reduce, size, biased, head_normed)


def test_gains_are_here_already():
    small, gains = ReplicatedGains(Comm(None)), drawn(0)[:2]
    small.prefetch(gains)
    assert torch.equal(small.gains(gains), torch.stack(gains))
    small.prefetch(gains)  # and twice is no misuse: nothing is on its way
