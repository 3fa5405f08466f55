"""A hang ends every rank in time, with its stacks, how far each got, and the rank that is to blame named."""

import ctypes
import faulthandler
import os
import re
import signal
import sys
import threading
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed import run_distributed
from waiting import LIMIT_S, hang, wait_until
from wandb_files import parsed, rows

from megatsp.comm import Comm, Traffic
from megatsp.schema import Config, LoggingConfig
from megatsp.training.events import read_objects
from megatsp.training.logs import Reporter
from megatsp.training.watchdog import Clock, Limits, Watchdog, summary

TIMEOUT_S = 600.0
LIMITS = Limits.within(TIMEOUT_S)


class HangClock(Clock):
    """A rank's clock: it stands at zero until the rank hangs, and then at `at`, however fast the machine is.

    Args:
        at: seconds without a beat, once the rank hangs.
        until: the clock goes on to there: a wait takes as long as it says. By default it stands.
        file: where it writes how late it is.

    Faulthandler's timer is real, so it is wound for longer than any test may take, until `lock`.
    """

    def __init__(self, at: float, file: Path, until: float = 0.0) -> None:
        self.hangs = threading.Event()
        self.waits = False  # whether it hangs only once the main thread is in a `wait`
        self._at, self._until, self._file, self._now = at, until, file, 0.0
        self._timer_s, self._winds = LIMIT_S, 0

    def now(self) -> float:
        if not self._now and self.hangs.is_set() and (not self.waits or in_wait()):
            self._now = self._at
            self._write()
        return self._now

    def wait(self, event: threading.Event, seconds: float) -> bool:
        if 0 < self._now < self._until:
            self._now = min(self._now + seconds, self._until)
        self._write()
        return event.wait(0.002)

    def wind(self, seconds: float) -> None:
        super().wind(self._timer_s)
        self._winds += 1

    def _write(self) -> None:
        self._file.write_text(str(self._now))

    def lock(self) -> None:
        """Returns once faulthandler's timer is short: whoever now keeps Python's lock is ended by it."""
        self._timer_s, before = 0.2, self._winds
        wait_until(lambda: self._winds > before + 1, "the watchdog winds the timer")


def in_wait() -> bool:
    """Whether the main thread waits in a collective."""
    ident = threading.main_thread().ident
    assert ident is not None
    return sys._current_frames()[ident].f_code.co_name == "wait"


def clock_of(folder: Path, rank: int, how: str) -> HangClock:
    """Rank 0's, or that of rank 1, which hangs."""
    file = folder / f"clock{rank}"
    if how == "sleeps":  # rank 0 is merely quiet: it ends because rank 1 does
        return HangClock((LIMITS.looks_s if rank == 0 else LIMITS.gives_up_s) + 1, file)
    if how == "stopped":
        return HangClock(LIMITS.gives_up_s + 1, file, until=TIMEOUT_S)
    # Until rank 1 is ended by its timer: where a parent hears of one rank's end, it ends the others.
    return HangClock(LIMITS.gives_up_s + 1, file, until=LIMITS.timer_s)


def stuck(folder: Path, how: str) -> None:
    """On a rank: three steps of beats and collectives, after which rank 1 does not come to the fourth."""
    rank = dist.get_rank()
    stderr = os.open(folder / f"stderr{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(stderr, 2)
    traffic, clock = Traffic(), clock_of(folder, rank, how)
    clock.waits = rank == 0
    with Watchdog(folder, TIMEOUT_S, traffic, clock) as watchdog:
        watchdog.on_hang = (folder / "alert").write_text
        comm = Comm(dist.group.WORLD, traffic)
        for step in range(4):
            watchdog.beat(f"step {step}")
            if step == 3 and rank == 0:
                clock.hangs.set()
            if step == 3 and rank == 1:
                if how == "stopped":
                    os.kill(os.getpid(), signal.SIGSTOP)
                elif how == "locked":
                    wait_until(lambda: list((folder / "hangs").glob("*/told")), "rank 0 has said who hangs")
                    clock.lock()
                    ctypes.PyDLL(None).sleep(int(LIMIT_S))  # and nothing else of Python runs
                clock.hangs.set()
                hang()
            comm.all_reduce(torch.ones(5), "test").wait()


def run_hang(folder: Path, how: str) -> str:
    """The failure that the parent sees."""
    with pytest.raises(AssertionError) as failure:
        run_distributed(stuck, 2, folder, how)
    return str(failure.value)


def late_s(folder: Path, rank: int) -> float:
    """How long after its last beat a rank ended, by its clock."""
    return float((folder / f"clock{rank}").read_text())


def read(folder: Path, name: str) -> str:
    return next((folder / "hangs").glob(f"*/{name}")).read_text()


def test_a_rank_that_does_not_come_is_found(tmp_path):
    assert "died with exit code 76" in run_hang(tmp_path, "sleeps")
    waiting, sleeping = read(tmp_path, "rank_00000.txt"), read(tmp_path, "rank_00001.txt")
    assert waiting.startswith("rank 0 of 2: step 3, for ")
    assert "in wait" in waiting and "test_watchdog.py" in waiting
    assert re.search(
        r"default_pg: all_reduce 4 \(test\), 20 bytes, posted [\d.]+ s ago, NOT finished", waiting
    )
    assert re.search(r"gloo:all_reduce \[5\] NOT finished", waiting)
    assert "all_reduce 3 (test), 20 bytes" in sleeping and "ago, finished" in sleeping
    said = (tmp_path / "stderr0").read_text()
    assert "ranks 0, 1: step 3, for " in said
    assert "likely culprit: rank 1 (rank 1 posted " in said
    # The first rank that ends takes the others with it: nobody may, before rank 0 has told.
    assert (tmp_path / "alert").read_text() in said


def test_a_stopped_rank_is_named_by_the_others(tmp_path):
    assert "rank 0 of 2 failed:\nit died with exit code 76" in run_hang(tmp_path, "stopped")
    assert LIMITS.says_s < late_s(tmp_path, 0) < TIMEOUT_S  # it has waited, though not for ever
    said = (tmp_path / "stderr0").read_text()
    assert "rank 1 wrote nothing" in said and "likely culprit: rank 1\n" in said


def test_a_rank_that_holds_pythons_lock_ends_too(tmp_path):
    assert re.search("rank 1 of 2 failed:\nit died with exit code 1$", run_hang(tmp_path, "locked"))
    said = (tmp_path / "stderr1").read_text()
    assert "most recent call first" in said and "in stuck" in said
    assert "likely culprit: rank 1\n" in (tmp_path / "stderr0").read_text()


def hang_alone(folder: Path, how: str) -> None:
    """On a rank, which reports: three steps, and no fourth."""
    config = replace(Config(), logging=LoggingConfig(wandb="offline"))
    clock = HangClock(
        LIMITS.gives_up_s + 1, folder / "clock0", until=TIMEOUT_S if how == "hangs too" else 0.0
    )
    with Watchdog(folder, TIMEOUT_S, clock=clock) as watchdog:
        reporter = Reporter(config, folder, 0, "", active=True)
        if how == "reports":
            watchdog.on_hang = reporter.hang
        elif how == "hangs too":
            watchdog.on_hang = lambda text: hang()
        else:
            watchdog.on_hang = lambda text: 1 / 0
        for iteration in (1, 2, 3):
            watchdog.beat(f"step {iteration}")
            reporter.log(iteration, {"lm loss": 1.0})
            reporter.advance()
            reporter.begin_wandb()
        clock.hangs.set()
        hang()


@pytest.mark.parametrize("how", ["reports", "hangs too", "fails"])
def test_what_a_hang_is_told_to_does_not_delay_the_end(tmp_path, how):
    with pytest.raises(AssertionError, match="died with exit code 76"):
        run_distributed(hang_alone, 1, tmp_path, how)
    assert LIMITS.gives_up_s < late_s(tmp_path, 0) < LIMITS.exits_s  # it gets five seconds, not all
    if how != "reports":
        return
    (event,) = read_objects(tmp_path / "events.jsonl")
    assert (event["kind"], event["iteration"]) == ("hang", 3) and "rank 0: step 3" in event["text"]
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    (alert,) = [record.alert for record in parsed(file) if record.WhichOneof("record_type") == "alert"]
    assert (alert.title, alert.level) == ("hang: run", "ERROR") and "no progress" in alert.text
    assert [step for step, _ in rows(file)] == [1, 2]  # the third may not be all: the next start gives it


class HandClock(Clock):
    """Goes on where the test says so, and keeps what its timer was wound to."""

    def __init__(self) -> None:
        self.time, self.wound = 0.0, list[float]()

    def now(self) -> float:
        return self.time

    def wait(self, event: threading.Event, seconds: float) -> bool:
        return event.wait(0.001)

    def wind(self, seconds: float) -> None:
        self.wound.append(seconds)


def test_beats_keep_it_quiet(tmp_path, monkeypatch):
    clock, limits, cancelled = HandClock(), Limits.within(TIMEOUT_S), []
    monkeypatch.setattr(
        faulthandler, "cancel_dump_traceback_later", lambda: cancelled.append(len(clock.wound))
    )
    with Watchdog(tmp_path, TIMEOUT_S, clock=clock) as watchdog:
        for _ in range(16):
            watchdog.beat("a step")
            clock.time += limits.gives_up_s
            before = len(clock.wound)
            wait_until(lambda n=before: len(clock.wound) > n + 1, "the watchdog has looked")
    assert cancelled == [len(clock.wound)]  # and nothing fires later
    assert max(clock.wound) == limits.timer_s
    assert min(clock.wound) == limits.timer_s - limits.gives_up_s  # what then was left without a thread
    assert not any(thread.name == "watchdog" for thread in threading.enumerate())
    assert list(tmp_path.iterdir()) == []


def test_zero_watches_nothing(tmp_path):
    with Watchdog(tmp_path, 0):
        assert not any(thread.name == "watchdog" for thread in threading.enumerate())
    with Watchdog(tmp_path, 3600):
        assert any(thread.name == "watchdog" for thread in threading.enumerate())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("timeout_s", [3, 20, 60, 600, 7200])
def test_each_limit_leaves_time_before_the_next(timeout_s):
    found = Limits.within(timeout_s)
    order = [0, found.looks_s, found.gives_up_s, found.says_s, found.timer_s, found.exits_s, timeout_s]
    assert all(later - sooner > 0.999 * found.tick_s for sooner, later in pairwise(order))
    assert timeout_s - found.gives_up_s <= 60  # a step that takes long is given nearly all of the time


def test_a_clock_is_real_unless_another_is_given():
    clock, event = Clock(), threading.Event()
    assert not clock.wait(event, 0.0)
    event.set()
    before = clock.now()
    assert clock.wait(event, 3600.0) and clock.now() >= before


def test_summary_of_ranks_that_all_wait():
    states = {rank: {"what": "step 3", "quiet_s": 9.0, "collectives": {"0": 7}} for rank in range(3)}
    assert "none stands out" in summary(states, 3, Path("hangs"))
    states[2]["collectives"] = {"0": 6}
    assert "culprit: rank 2 (rank 2 posted 6 collectives in group 0, others 7)" in summary(
        states, 3, Path("hangs")
    )
