"""The slowest rank is found by its own time, and named when it is much slower than the others."""

import socket

import torch
import torch.distributed as dist
from distributed import run_distributed

from megatsp.training.slow_ranks import SlowRanks

CPU = torch.device("cpu")


def reports() -> list[tuple[dict[str, float | str], str]]:
    """On a rank: of two intervals with a slow rank 2, one with equal ranks, then a slow one again; all with
    factor 2, and of the second with factor 0 too.
    """
    ranks, silent = SlowRanks(2.0, CPU), SlowRanks(0.0, CPU)

    def slow(which: SlowRanks) -> None:
        for ms in (10.0, 30.0):
            which.add(ms + (25.0 if dist.get_rank() == 2 else dist.get_rank()))

    slow(ranks)
    found = [ranks.report(2)]
    slow(silent)
    silent.report(2)
    for which in (ranks, silent):
        slow(which)
    found += [ranks.report(4), silent.report(4)]
    ranks.add(5.0)
    found.append(ranks.report(5))
    slow(ranks)
    return [*found, ranks.report(7)]


def test_a_rank_that_is_slow_twice_is_named_with_its_host():
    metrics = {"ranks/busy-ms-max": 45.0, "ranks/busy-ms-median": 21.0, "ranks/slowest": 2.0}
    for once, twice, silent, equal, again in run_distributed(reports, 3):
        assert once == (metrics, "")
        assert twice[0] == {**metrics, "ranks/slow-host": socket.gethostname()}
        assert twice[1].startswith(f" rank 2 on {socket.gethostname()} is slow: busy for 45.0 ms a step")
        assert "to iteration 4, 2.1 times the median" in twice[1]
        assert silent == (metrics, "")
        assert equal == ({"ranks/busy-ms-max": 5.0, "ranks/busy-ms-median": 5.0, "ranks/slowest": 0.0}, "")
        assert again == (metrics, "")
