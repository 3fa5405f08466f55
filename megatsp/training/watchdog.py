"""A hang becomes every rank's stacks, what each did last, and exit status 76.

Every rank watches itself from a thread, since a thread still runs while the program waits in a collective.
The first rank that has had no `beat` for most of the time makes <run>/hangs/<start of this run>/; the
others look for that folder as soon as they are quiet too. Each writes rank_00003.txt (the stacks of all its
threads, then its last collectives) and rank_00003.json (how far it got), waits for the others', and exits
before the time is over. A rank that is stopped or gone cannot write: the others name it.

Where not even a thread runs, because C code holds Python's lock, faulthandler's own timer prints the stacks
on stderr and ends the process, with status 1; the others have waited so long.
"""

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

from megatsp.comm import Traffic
from megatsp.exit_status import HANG
from megatsp.training.collectives import flight, last_posted
from megatsp.training.ranks import from_first

_STDERR = 2  # the process's own: sys.stderr may be an object without a file
_TOLD_S = 5.0  # that on_hang may take


@dataclass(frozen=True)
class Limits:
    """Seconds without a beat after which each thing happens, in this order; and those between two looks."""

    tick_s: float
    looks_s: float  # this rank looks whether another one hangs
    gives_up_s: float  # it hangs itself
    says_s: float  # whoever has written nothing by then is named as the one that cannot
    timer_s: float  # faulthandler ends a process in which no thread runs
    exits_s: float  # a rank that waits for others waits no longer

    @classmethod
    def within(cls, timeout_s: float) -> "Limits":
        """Those by which every rank has ended timeout_s after its last beat."""
        gives_up_s = max(0.75 * timeout_s, timeout_s - 60)
        exits_s = max(0.95 * timeout_s, timeout_s - 5)
        rest_s = exits_s - gives_up_s
        return cls(
            tick_s=min(1.0, timeout_s / 20),
            looks_s=timeout_s / 4,
            gives_up_s=gives_up_s,
            says_s=gives_up_s + rest_s / 2,
            timer_s=gives_up_s + 0.75 * rest_s,
            exits_s=exits_s,
        )


class Clock:
    """The time that a watchdog goes by. Tests give it one that stands until their rank hangs."""

    def now(self) -> float:
        return time.monotonic()

    def wait(self, event: threading.Event, seconds: float) -> bool:
        """Returns whether the event is set, at the latest after so many seconds."""
        return event.wait(seconds)

    def wind(self, seconds: float) -> None:
        """Lets faulthandler end this process after so many seconds, unless it is wound anew."""
        faulthandler.dump_traceback_later(seconds, exit=True, file=_STDERR)


class Watchdog:
    """Ends this process if no `beat` comes for so long; a context manager, entered by all ranks together.

    Args:
        folder: the run's.
        timeout_s: from the last beat to the exit; 0 watches nothing.
        traffic: of the axes, if they are known already: else set it later.
        clock: what the limits are counted by.

    on_hang, if set, is called with the summary by the rank that prints it, in a thread: it may take what is
    left of the time, but 5 s at most, and may fail.
    """

    def __init__(
        self, folder: Path, timeout_s: float, traffic: Traffic | None = None, clock: Clock | None = None
    ) -> None:
        self.traffic = traffic
        self.on_hang: Callable[[str], object] | None = None
        self._folder, self._timeout_s = folder, timeout_s
        self._limits = Limits.within(timeout_s)
        self._clock = clock or Clock()
        self._last = (self._clock.now(), "starting")
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._rank, self._size = 0, 1
        self._hang = folder

    def beat(self, what: str) -> None:
        """This rank got on: it now does `what`. Costs next to nothing."""
        self._last = (self._clock.now(), what)

    def __enter__(self) -> "Watchdog":
        if not self._timeout_s:
            return self
        started = time.strftime("%Y%m%dT%H%M%S")
        if dist.is_initialized():
            self._rank, self._size = dist.get_rank(), dist.get_world_size()
            started = from_first(started)
        self._hang = self._folder / "hangs" / started
        self.beat("starting")
        self._clock.wind(self._limits.timer_s)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._ended.set()
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        limits = self._limits
        while not self._clock.wait(self._ended, limits.tick_s):
            quiet_s = self._clock.now() - self._last[0]
            # Wound up anew as long as threads run; nothing holds Python's lock then.
            self._clock.wind(max(0.1, limits.timer_s - quiet_s))
            if quiet_s > limits.gives_up_s or (quiet_s > limits.looks_s and self._hang.is_dir()):
                self._end()

    def _end(self) -> None:
        """Writes what this rank knows, waits for the others', says who hangs, and exits."""
        since, what = self._last
        quiet_s = self._clock.now() - since
        self._clock.wind(max(self._limits.tick_s, self._timeout_s - quiet_s))  # torch's recorder may be stuck
        try:
            self._dump(what, quiet_s)
            found = self._others(since + self._limits.says_s)
        except OSError as error:  # a full disk, perhaps what it hangs for
            print(f"megatsp: cannot write {self._hang}: {error.strerror}", file=sys.stderr)
            faulthandler.dump_traceback(_STDERR)
            found = {self._rank: {"what": what, "quiet_s": quiet_s, "collectives": {}}}
        told = self._hang / "told"
        exits = since + self._limits.exits_s
        if self._rank == min(found):
            text = summary(found, self._size, self._hang)
            print(text, file=sys.stderr, flush=True)
            self._tell(text, exits)
            with suppress(OSError):
                told.touch()
        # A rank without threads has its timer yet; and launchers kill all once one has ended.
        while self._clock.now() < exits and (len(found) < self._size or not told.exists()):
            self._pause()
        os._exit(HANG)

    def _pause(self) -> None:
        self._clock.wait(threading.Event(), self._limits.tick_s / 4)

    def _tell(self, text: str, deadline: float) -> None:
        """Calls on_hang, and waits for it as long as there is time."""
        if self.on_hang is None:
            return
        on_hang, done = self.on_hang, threading.Event()

        def tell() -> None:
            with suppress(Exception):  # the hang was printed: this process ends for it, for nothing else
                on_hang(text)
            done.set()

        threading.Thread(target=tell, name="hang", daemon=True).start()
        deadline = min(deadline, self._clock.now() + _TOLD_S)
        while not done.is_set() and self._clock.now() < deadline:
            self._clock.wait(done, self._limits.tick_s / 4)

    def _dump(self, what: str, quiet_s: float) -> None:
        self._hang.mkdir(parents=True, exist_ok=True)
        with (self._hang / f"rank_{self._rank:05d}.txt").open("w") as file:
            file.write(f"rank {self._rank} of {self._size}: {what}, for {quiet_s:.1f} s\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
            file.write("\nlast collectives of each axis\n")
            file.writelines(f"  {line}\n" for line in last_posted(self.traffic))
            file.flush()  # what follows asks torch, which may be what is stuck
            known = flight()
            file.write("\ntorch's flight recorder, newest last\n")
            file.writelines(f"  {line}\n" for line in known.lines)
        state = {"what": what, "quiet_s": quiet_s, "collectives": known.posted}
        path = self._hang / f"rank_{self._rank:05d}.json"
        path.with_suffix(".tmp").write_text(json.dumps(state))
        path.with_suffix(".tmp").replace(path)

    def _others(self, deadline: float) -> dict[int, dict[str, Any]]:
        """By rank, what each wrote; waits until all have, or until the deadline."""
        paths = {rank: self._hang / f"rank_{rank:05d}.json" for rank in range(self._size)}
        while True:
            there = {rank: path for rank, path in paths.items() if path.exists()}
            if len(there) == self._size or self._clock.now() > deadline:
                return {rank: json.loads(path.read_text()) for rank, path in there.items()}
            self._pause()


def summary(found: dict[int, dict[str, Any]], size: int, folder: Path) -> str:
    """Where each rank stands and which one the others wait for, in lines for stderr.

    found: by rank, what it wrote: what it did last, for how long, and how many collectives it has posted in
    each process group.
    """
    lines = [f"megatsp: error: no progress; the ranks' stacks are in {folder}"]
    silent = [rank for rank in range(size) if rank not in found]
    groups = {name for state in found.values() for name in state["collectives"]}
    behind: dict[int, str] = {}
    for name in sorted(groups):
        counts = {
            rank: state["collectives"][name] for rank, state in found.items() if name in state["collectives"]
        }
        most = max(counts.values())
        for rank, count in counts.items():
            if count < most and rank not in behind:
                behind[rank] = f"{count} collectives in group {name}, others {most}"
    states: dict[str, list[int]] = {}
    for rank, state in found.items():
        states.setdefault(state["what"], []).append(rank)
    for what, ranks in states.items():
        longest = max(found[rank]["quiet_s"] for rank in ranks)
        lines.append(f"  {_named(ranks)}: {what}, for {longest:.0f} s")
    if silent:
        lines.append(f"  {_named(silent)} wrote nothing: stopped, killed, or its machine is gone")
    if silent:
        lines.append(f"  likely culprit: {_named(silent)}")
    elif behind:
        why = "; ".join(f"rank {rank} posted {text}" for rank, text in list(behind.items())[:4])
        lines.append(f"  likely culprit: {_named(sorted(behind))} ({why})")
    elif size > 1:
        lines.append("  likely culprit: none stands out: all posted the same collectives")
    return "\n".join(lines)


def _named(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:16])) + (", ..." if len(ranks) > 16 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"
