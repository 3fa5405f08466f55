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
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

from megatsp.comm import Traffic
from megatsp.exit_status import HANG
from megatsp.training.collectives import flight, last_posted
from megatsp.training.ranks import from_first

_STDERR = 2  # the process's own: sys.stderr may be an object without a file


class Watchdog:
    """Ends this process if no `beat` comes for so long; a context manager, entered by all ranks together.

    Args:
        folder: the run's.
        timeout_s: from the last beat to the exit; 0 watches nothing.
        traffic: of the axes, if they are known already: else set it later.

    on_hang, if set, is called with the summary by the rank that prints it, in a thread: it may take what is
    left of the time, but 5 s at most, and may fail.
    """

    def __init__(self, folder: Path, timeout_s: float, traffic: Traffic | None = None) -> None:
        self.traffic = traffic
        self.on_hang: Callable[[str], object] | None = None
        self._folder, self._timeout_s = folder, timeout_s
        self._tick_s = min(1.0, timeout_s / 20)
        self._looks_s = timeout_s / 4  # when it is quiet enough to look whether another rank hangs
        self._gives_up_s = max(0.75 * timeout_s, timeout_s - 60)
        self._exits_s = max(0.95 * timeout_s, timeout_s - 5)
        rest_s = self._exits_s - self._gives_up_s
        self._says_s, self._timer_s = self._gives_up_s + rest_s / 2, self._gives_up_s + 0.75 * rest_s
        self._last = (time.monotonic(), "starting")
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._rank, self._size = 0, 1
        self._hang = folder

    def beat(self, what: str) -> None:
        """This rank got on: it now does `what`. Costs next to nothing."""
        self._last = (time.monotonic(), what)

    def __enter__(self) -> "Watchdog":
        if not self._timeout_s:
            return self
        started = time.strftime("%Y%m%dT%H%M%S")
        if dist.is_initialized():
            self._rank, self._size = dist.get_rank(), dist.get_world_size()
            started = from_first(started)
        self._hang = self._folder / "hangs" / started
        self.beat("starting")
        faulthandler.dump_traceback_later(self._timer_s, exit=True, file=_STDERR)
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
        while not self._ended.wait(self._tick_s):
            quiet_s = time.monotonic() - self._last[0]
            # Wound up anew as long as threads run; nothing holds Python's lock then.
            faulthandler.dump_traceback_later(max(0.1, self._timer_s - quiet_s), exit=True, file=_STDERR)
            if quiet_s > self._gives_up_s or (quiet_s > self._looks_s and self._hang.is_dir()):
                self._end()

    def _end(self) -> None:
        """Writes what this rank knows, waits for the others', says who hangs, and exits."""
        since, what = self._last
        quiet_s = time.monotonic() - since
        left_s = max(self._tick_s, self._timeout_s - quiet_s)
        faulthandler.dump_traceback_later(
            left_s, exit=True, file=_STDERR
        )  # if torch's recorder is what is stuck
        try:
            self._dump(what, quiet_s)
            found = self._others(since + self._says_s)
        except OSError as error:  # a full disk, perhaps what it hangs for
            print(f"megatsp: cannot write {self._hang}: {error.strerror}", file=sys.stderr)
            faulthandler.dump_traceback(_STDERR)
            found = {self._rank: {"what": what, "quiet_s": quiet_s, "collectives": {}}}
        told = self._hang / "told"
        if self._rank == min(found):
            text = summary(found, self._size, self._hang)
            print(text, file=sys.stderr, flush=True)
            self._tell(text, since + self._exits_s)
            with suppress(OSError):
                told.touch()
        # A rank without threads has its timer yet; and launchers kill all once one has ended.
        while time.monotonic() < since + self._exits_s and (len(found) < self._size or not told.exists()):
            time.sleep(self._tick_s / 4)
        os._exit(HANG)

    def _tell(self, text: str, deadline: float) -> None:
        """Calls on_hang, and waits for it as long as there is time."""

        def tell() -> None:
            assert self.on_hang is not None
            with suppress(Exception):  # the hang was printed: this process ends for it, for nothing else
                self.on_hang(text)

        if self.on_hang is not None:
            teller = threading.Thread(target=tell, name="hang", daemon=True)
            teller.start()
            teller.join(max(0.0, min(5.0, deadline - time.monotonic())))

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
            if len(there) == self._size or time.monotonic() > deadline:
                return {rank: json.loads(path.read_text()) for rank, path in there.items()}
            time.sleep(self._tick_s / 4)


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
