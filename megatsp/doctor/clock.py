"""Clocks: of hosts against the first one's, and of the file system's server against this host's."""

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from megatsp.doctor.finding import OK, PROBLEM, WARNING, Finding

_ODD_S, _WRONG_S = 0.5, 30.0
_TRIPS = 5


def check_skew(against: str, offset_s: float, error_s: float) -> Iterator[Finding]:
    """offset_s: how far this clock is ahead of another one, known to +- error_s."""
    text = f"{offset_s:+.3f} s against {against} (+- {error_s:.3f} s)"
    fix = "synchronise the hosts' clocks: chrony or ntpd (timedatectl set-ntp true)"
    surely = max(0.0, abs(offset_s) - error_s)
    if surely > _WRONG_S:  # certificates fail, and what is newest is not what was written last
        yield Finding("clock", "skew", PROBLEM, text, fix)
    elif surely > _ODD_S:
        yield Finding("clock", "skew", WARNING, text, fix)
    else:
        yield Finding("clock", "skew", OK, text)


def file_system_offset(folder: Path) -> tuple[float, float]:
    """(seconds that this clock is ahead of the time given to a new file, half of the time it took)."""
    before = time.time()
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".megatsp-doctor-") as file:
        file.write(b"now")
        file.flush()
        stamp = Path(file.name).stat().st_mtime
    after = time.time()
    # A file system rounds down to its tick, 10 ms on most.
    return (before + after) / 2 - stamp, (after - before) / 2 + 0.01


def offset_to_first(clock: Callable[[], float] = time.time) -> tuple[float, float]:
    """On all ranks: (seconds that this rank's clock is ahead of rank 0's, error), by the shortest round trip.

    Rank 0 answers each rank's message in turn with its time.
    """
    rank, best = dist.get_rank(), (0.0, float("inf"))
    message = torch.zeros(1, dtype=torch.float64)
    for peer in range(1, dist.get_world_size()):
        for _ in range(_TRIPS):
            if rank == 0:
                dist.recv(message, peer)
                dist.send(message.fill_(clock()), peer)
            elif rank == peer:
                before = clock()
                dist.send(message, 0)
                dist.recv(message, 0)
                after = clock()
                offset = (before + after) / 2 - message.item()
                best = min(best, (offset, (after - before) / 2), key=lambda found: found[1])
    return best if rank else (0.0, 0.0)
