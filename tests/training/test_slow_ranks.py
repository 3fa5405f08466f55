"""The slowest rank is found by its own time, and named when it is much slower than the others."""

import socket

import torch
import torch.distributed as dist
from distributed import run_distributed

from megatsp.training.slow_ranks import SlowRanks

CPU = torch.device("cpu")


def reports() -> list[tuple[dict[str, float], str]]:
    """On a rank: of two intervals, the first with a slow rank 2 and the second with equal ranks; all
    with factor 2, and of the first with factor 0.
    """
    ranks, silent = SlowRanks(2.0, CPU), SlowRanks(0.0, CPU)
    for ms in (10.0, 30.0):
        for slow in (ranks, silent):
            slow.add(ms + (25.0 if dist.get_rank() == 2 else dist.get_rank()))
    found = [ranks.report(2), silent.report(2)]
    ranks.add(5.0)
    return [*found, ranks.report(3)]


def test_the_slowest_rank_is_named_with_its_host():
    for slow, silent, equal in run_distributed(reports, 3):
        assert slow[0] == {"ranks/busy-ms-max": 45.0, "ranks/busy-ms-median": 21.0, "ranks/slowest": 2.0}
        assert slow[1].startswith(f" rank 2 on {socket.gethostname()} is slow: busy for 45.0 ms a step")
        assert "to iteration 2, 2.1 times the median" in slow[1]
        assert silent == (slow[0], "")
        assert equal == ({"ranks/busy-ms-max": 5.0, "ranks/busy-ms-median": 5.0, "ranks/slowest": 0.0}, "")
