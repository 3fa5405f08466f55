"""What the launcher is told while ranks run, and what it tells them."""

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from megatsp.exit_status import REQUEUE

STOPS = (signal.SIGINT, signal.SIGTERM)
PASSED_ON = (*STOPS, signal.SIGUSR1)
_KILLS = (signal.SIGHUP, signal.SIGQUIT)  # the first of them kills
_ONE_S = 0.1  # within which two of a kind are one: `timeout` and some schedulers send each twice


class Stopped(Exception):
    """A signal came while no rank ran."""


class Signals:
    """The signals that were heard, oldest first. Must be made in the main thread.

    Args:
        announced: the signals that stderr is told of.
        kill: called for the second one that stops.
    """

    def __init__(self, announced: Sequence[int], kill: Callable[[], None]) -> None:
        self.heard: list[int] = []
        self.is_hard = False
        self.pids: list[int] = []  # of the ranks that run
        self._announced, self._kill = announced, kill
        self._at: dict[int, float] = {}
        for number in (*PASSED_ON, *_KILLS):
            signal.signal(number, self._hear)

    @property
    def first(self) -> int:
        """The first one that stops the ranks, or 0."""
        return self.heard[0] if self.heard else 0

    def _hear(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if now - self._at.get(number, -1.0) < _ONE_S:
            return
        self._at[number] = now
        self.is_hard |= number in STOPS and any(before in STOPS for before in self.heard)
        self.is_hard |= number in _KILLS
        self.heard.append(number)
        if self.is_hard:
            self._kill()
            return
        if self.pids and number in self._announced:
            again = (
                "; Ctrl-C again aborts" if number == signal.SIGINT else f" ({signal.Signals(number).name})"
            )
            os.write(2, f"\nmegatsp: finishing this step{again}\n".encode())
        self._tell(number)

    def _tell(self, number: int) -> None:
        for pid in self.pids:
            with suppress(ProcessLookupError):  # it has ended already
                os.kill(pid, number)

    def started(self, pids: Sequence[int]) -> None:
        """Ranks run: they are told what came while they were started."""
        self.pids = list(pids)
        for number in self.heard:
            self._tell(number)

    def wait(self, seconds: float) -> None:
        """Returns after so long; raises Stopped once a signal was heard."""
        end = time.monotonic() + seconds
        while True:
            if self.heard:
                raise Stopped
            if time.monotonic() >= end:
                return
            time.sleep(min(0.05, max(0.0, end - time.monotonic())))


@contextmanager
def requeued() -> Iterator[None]:
    """Inside, until ranks are started, SIGTERM and SIGUSR1 end this process with status 75."""

    def end(number: int, frame: Any) -> None:
        os.write(2, f"megatsp: {signal.Signals(number).name} before a rank was started\n".encode())
        os._exit(REQUEUE)

    with restored():
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, end)
        yield


@contextmanager
def restored() -> Iterator[None]:
    """Restores the handlers that the agent and we replace."""
    handled = (*PASSED_ON, *_KILLS)
    before = {number: signal.getsignal(number) for number in handled}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
