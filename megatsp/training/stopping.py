"""When a run is asked to end early: by signals and by the clock, agreed on by all ranks, and what it answers.

A request is noted wherever the rank is, and acted on at the next point at which all ranks agree: after
set-up, in every step's all-reduce, after every batch of an evaluation. While rank 0 exports, it is alone:
there a request cuts its work off.
"""

import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from megatsp import exit_status
from megatsp.launcher import LAUNCHER_PID

LIMIT = "trainer.exit_duration_in_mins"
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class CutOff(BaseException):
    """A request, raised where a rank works alone. Not an Exception: nothing but its own handler takes it."""


@dataclass(frozen=True)
class Stop:
    """What was heard, by rank: names of signals, and LIMIT."""

    heard: tuple[tuple[str, ...], ...]

    @property
    def status(self) -> int:
        """Of a run that is not over: 0 where somebody pressed Ctrl-C, who wants no other start."""
        return 0 if any("SIGINT" in names for names in self.heard) else exit_status.REQUEUE

    def line(self, status: int) -> str:
        """What the log says of it, and of the exit status that it led to."""
        names = dict.fromkeys(name for names in self.heard for name in names)
        who = [
            f"{name} on rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
            for name in names
            if (ranks := [rank for rank, own in enumerate(self.heard) if name in own])
        ]
        meaning = "to be started again" if status == exit_status.REQUEUE else "done"
        return f" heard {'; '.join(who)}: exit status {status}, {meaning}"


class Stopper:
    """Hears SIGINT, SIGTERM, SIGUSR1 and the wall-clock limit of this rank, while it is a context.

    stop: what all ranks have agreed on, once they have.
    """

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.stop: Stop | None = None
        self._limit_s = 0.0
        self._before: dict[signal.Signals, Any] = {}
        self._alone = False

    def __enter__(self) -> "Stopper":
        self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def limit_to(self, minutes: float) -> None:
        """The wall-clock limit, from the start of this process's launcher or torchrun; 0: none."""
        self._limit_s = 60 * minutes

    def asked(self) -> bool:
        """Whether this rank was asked to end; the others may not know."""
        if self._limit_s and LIMIT not in self.heard and _running_s() > self._limit_s:
            self.heard.append(LIMIT)
        return bool(self.heard)

    def agree(self, asked: float) -> bool:
        """Whether the run ends here, on all ranks. asked: `asked()` of all ranks, summed."""
        import torch.distributed as dist

        if asked and self.stop is None:
            everywhere: list[Sequence[str]] = [()] * dist.get_world_size()
            dist.all_gather_object(everywhere, list(self.heard))
            self.stop = Stop(tuple(tuple(dict.fromkeys(names)) for names in everywhere))
        return self.stop is not None

    def check(self, device: Any) -> bool:
        """`agree`, where nothing else is summed over all ranks."""
        import torch

        from megatsp.training.ranks import sum_over_ranks

        asked = torch.tensor(float(self.asked()), device=device)
        return self.agree(sum_over_ranks(asked).item())

    @contextmanager
    def cutting_off(self) -> Iterator[None]:
        """Inside, a request raises CutOff at once, in this process alone; so does one that came before."""
        if self.asked():
            raise CutOff
        alarm = signal.signal(signal.SIGALRM, self._note)
        self._alone = True
        try:
            if self._limit_s:
                signal.setitimer(signal.ITIMER_REAL, max(self._limit_s - _running_s(), 1e-3))
            yield
        finally:
            self._alone = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, alarm)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.heard.append(LIMIT if number == signal.SIGALRM else signal.Signals(number).name)
        if self._alone:
            self._alone = False  # what is being cleaned up is not cut off again
            raise CutOff


def _running_s() -> float:
    """Since our launcher or torchrun started, which may start ranks again; or else this process."""
    agent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else "self"
    pid = os.environ.get(LAUNCHER_PID, agent)
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return time.clock_gettime(time.CLOCK_BOOTTIME) - int(after_name[19]) / os.sysconf("SC_CLK_TCK")
    except OSError:  # not on Linux
        return time.monotonic() - _IMPORTED


_IMPORTED = time.monotonic()
