"""Gains cut over h arrive whole, and gradients of gains and vectors return summed."""

import pytest
import torch
import torch.distributed as dist
from distributed import run_distributed
from torch import Tensor

from megatsp.comm import Comm
from megatsp.tsp.attention import HeadVectors
from megatsp.tsp.small import SmallParameters

H, D = 12, 4


def drawn(rank: int) -> list[Tensor]:
    """On a rank: two [h] of gains, biases of q, k, v, head gains of q and k [d]."""
    generator = torch.Generator().manual_seed(rank)
    sizes = (H, H, 3 * D, D, D, D, D)
    return [torch.randint(-9, 10, (n,), generator=generator).float() for n in sizes]


def rank_small() -> None:
    comm = Comm(dist.group.WORLD)
    small, mine, gains = SmallParameters(comm), drawn(comm.rank), drawn(100)[:2]
    shards = [gain.chunk(comm.size)[comm.rank] for gain in gains]
    small.prefetch(shards)
    if comm.size > 1:
        with pytest.raises(RuntimeError, match="the gains are on their way already"):
            small.prefetch(shards)
    for _ in range(2):  # prefetched, and not
        assert torch.equal(small.gains(shards), torch.stack(gains))
    total = [sum(of_rank) for of_rank in zip(*(drawn(r) for r in range(comm.size)), strict=True)]
    dgains, dvectors = small.reduce(mine[:2], HeadVectors.of(mine[2:], True, True))()
    expected = [t.chunk(comm.size)[comm.rank] for t in total[:2]] + total[2:]
    for found, wanted in zip([*dgains, *dvectors], expected, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_gains_arrive_and_gradients_return(size):
    run_distributed(rank_small, size)
