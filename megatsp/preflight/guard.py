"""Ends a rank whose measurement raises or does not end, and leaves behind which nodes are suspected."""

import os
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from megatsp.exit_status import FAILURE, HARDWARE
from megatsp.launcher.failures import Failure
from megatsp.launcher.outcome import write_outcome
from megatsp.preflight.judge import Place, name_devices


class Guard:
    """Of one rank, after the default process group was joined.

    Args:
        places: of all ranks, in their order.
        limit_s: of one measurement.
        folder: of a job's attempt, where outcomes go; None outside a job.
    """

    def __init__(self, places: Sequence[Place], limit_s: float, folder: Path | None) -> None:
        self._places, self._limit_s, self._folder = places, limit_s, folder
        self._rank = dist.get_rank()
        # Of its own: the other one may be held by a group that waits for a rank.
        self._store = _get_default_store().clone()  # type: ignore[attr-defined]  # torch's stub lacks it

    @contextmanager
    def over(self, what: str, peers: Sequence[int] = ()) -> Iterator[None]:
        """Guards a measurement. peers: the ranks that it waits for."""
        timer = threading.Timer(self._limit_s, self._end_late, (what, peers))
        timer.daemon = True
        timer.start()
        try:
            yield
        except RuntimeError as error:  # what torch raises, of a device or of a transfer
            timer.cancel()
            self._end_raised(what, error)
        finally:
            timer.cancel()

    def _end_raised(self, what: str, error: RuntimeError) -> None:
        """Suspects this node, unless another rank has ended before: then that is what was raised here."""
        headline = f"{self._name(self._rank)}: {what}: {first_line(error)}"
        is_first = self._count("raised", 1) == 1 and self._count("late", 0) == 0
        self._end(headline, [self._rank] if is_first else [], traceback.format_exc())

    def _end_late(self, what: str, peers: Sequence[int]) -> None:
        """Suspects both ends of a pair, or the node within which it happened; of more nodes none."""
        names = ", ".join(map(self._name, peers[:8])) + (", ..." if len(peers) > 8 else "")
        waits = f", which waits for {names}" if peers else ""
        headline = f"{self._name(self._rank)}{waits}: {what} has not ended in {self._limit_s:g} s"
        self._count("late", 1)
        ranks = [self._rank, *peers]
        together = len({self._places[rank].node for rank in ranks}) == 1
        suspects = [self._rank] if together else ranks if len(ranks) == 2 else []
        if self._count("raised", 0) != 0:
            suspects = []
        elif not suspects and self._folder is not None:
            write_outcome(self._folder, Failure(self._rank, FAILURE, headline))
        self._end(headline, suspects, "")

    def _end(self, headline: str, suspects: Sequence[int], detail: str) -> None:
        print(f"megatsp: error: {headline}\n{detail}", end="", file=sys.stderr, flush=True)
        if self._folder is not None:
            for rank in suspects:
                failure = Failure(rank, HARDWARE, headline, detail, host=self._places[rank].node)
                write_outcome(self._folder, failure)
        sys.stdout.flush()
        os._exit(HARDWARE)

    def _name(self, rank: int) -> str:
        return f"{self._places[rank].node}, {name_devices([self._places[rank]])}"

    def _count(self, what: str, by: int) -> int:
        """How many ranks have ended so; -1 if nobody tells, for rank 0 has gone."""
        try:
            return int(self._store.add(f"preflight/{what}", by))
        except RuntimeError:
            return -1


def first_line(error: BaseException) -> str:
    """What an error says first: torch's go on with its own stack."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
