"""Which rank holds the others up: the time in which each was busy itself, compared over all ranks.

A collective makes every rank's step as long as the slowest one's, so step times alone tell nothing; what
tells is the time that a rank did not spend waiting for others.
"""

import socket
import statistics

import torch
import torch.distributed as dist


class SlowRanks:
    """Mean busy times since the last report, of this rank and by `report` of all.

    Args:
        factor: how many times the median makes a rank a slow one, twice in a row: one long step of a short
            interval says little. 0: none is.
        device: where collectives' tensors live.
    """

    def __init__(self, factor: float, device: torch.device) -> None:
        self._factor, self._device = factor, device
        self._total_ms, self._steps = 0.0, 0
        self._hosts: list[str] = []
        self._suspect = -1  # who was so slow in the interval before

    def add(self, busy_ms: float) -> None:
        """A step has ended in which this rank computed, read or copied so long, waiting left out."""
        self._total_ms += busy_ms
        self._steps += 1

    def report(self, iteration: int) -> tuple[dict[str, float | str], str]:
        """Compares the ranks and begins anew; on all ranks.

        Returns the metrics, the same on all ranks, and a line that names a slow rank's host, or "". Of a slow
        rank the metrics have the host too, as ranks/slow-host.
        """
        mean_ms = self._total_ms / max(1, self._steps)
        self._total_ms, self._steps = 0.0, 0
        rank, world = dist.get_rank(), dist.get_world_size()
        every = torch.zeros(world, dtype=torch.float64, device=self._device)
        every[rank] = mean_ms
        if world > 1:
            dist.all_reduce(every)  # each rank's own place, the others add 0: an all-gather
        if not self._hosts:
            self._hosts = [""] * world
            dist.all_gather_object(self._hosts, socket.gethostname())
        busy = every.tolist()
        slowest = max(range(world), key=busy.__getitem__)
        median = statistics.median_low(busy)  # of two ranks the faster one, which the other is held against
        metrics: dict[str, float | str] = {
            "ranks/busy-ms-max": busy[slowest],
            "ranks/busy-ms-median": median,
            "ranks/slowest": float(slowest),
        }
        before, self._suspect = self._suspect, -1
        if not self._factor or busy[slowest] <= self._factor * median:
            return metrics, ""
        self._suspect = slowest
        if before != slowest:
            return metrics, ""
        metrics["ranks/slow-host"] = self._hosts[slowest]
        times = busy[slowest] / max(median, 1e-9)
        return metrics, (
            f" rank {slowest} on {self._hosts[slowest]} is slow: busy for {busy[slowest]:.1f} ms a step to "
            f"iteration {iteration}, {times:.1f} times the median of all ranks ({median:.1f} ms)"
        )
