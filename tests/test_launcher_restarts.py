"""Which failures are tried again, after which pause, and when that ends."""

import re
import signal
import subprocess
import sys

import pytest
from waiting import LIMIT_S

from megatsp.launcher.failures import Failure, failures
from megatsp.launcher.restarts import Count, Restarts
from megatsp.launcher.signals import Signals, restored

KILLED = Failure(1, 137, "killed by SIGKILL", was_killed=True)
RAISED = Failure(0, 1, "RuntimeError: broken", "Traceback ...\n")
OTHER = Failure(0, 1, "RuntimeError: broken otherwise", "Traceback ...\n")


class Run:
    """A count of restarts over checkpoints that the test makes."""

    def __init__(self, limit: int, backoff_s: float = 5.0) -> None:
        self.newest = 0
        self.count = Count(Restarts(limit, backoff_s, lambda: self.newest))

    def pauses(self, *causes: Failure) -> list[float | None]:
        return [self.count.pause_s(cause) for cause in causes]


def test_pauses_double_up_to_a_limit(capsys):
    assert Run(9).pauses(*[KILLED] * 10) == [5, 10, 20, 40, 80, 160, 300, 300, 300, None]
    said = capsys.readouterr().err.splitlines()
    line = (
        r"megatsp: \d\d:\d\d:\d\d: rank 1 killed by SIGKILL: all ranks start again in 10 s \(restart 2 of 9 "
    )
    assert re.match(line, said[1])
    assert said[-1].startswith("megatsp: not started again: 9 restarts in a row brought no new checkpoint")


def test_a_new_checkpoint_counts_anew():
    run = Run(2)
    assert run.pauses(KILLED, KILLED) == [5, 10]
    run.newest = 3
    assert run.pauses(KILLED, KILLED, KILLED) == [5, 10, None]
    run.newest = 2  # an older one, because the newest was damaged, is no progress
    assert run.pauses(KILLED) == [None]
    run.newest = 3  # but what comes after it is
    assert run.pauses(KILLED) == [5]


def test_the_same_error_twice_in_a_row_is_not_tried_again(capsys):
    assert Run(9).pauses(RAISED, OTHER, KILLED, OTHER, RAISED, RAISED) == [5, 10, 20, 40, 80, None]
    assert "not started again: the same error twice in a row" in capsys.readouterr().err
    memory = [
        Failure(rank, 1, f"OutOfMemoryError: GPU {rank}: no 1.{rank} GiB", "Traceback") for rank in (3, 5)
    ]
    assert Run(9).pauses(*memory) == [5, None]  # numbers change, and it is the same error
    run = Run(9)
    assert run.pauses(RAISED) == [5]
    run.newest = 1
    assert run.pauses(RAISED) == [5]


@pytest.mark.parametrize("status", [2, 7, 74, 75, 77, 130])
def test_some_statuses_are_final(status, capsys):
    assert Run(9).pauses(Failure(0, status, "as it says")) == [None]
    assert Run(0).pauses(KILLED) == [None]
    assert capsys.readouterr().err == ""


def test_a_hang_is_tried_again(tmp_path):
    (found,) = failures({1: 76}, tmp_path)
    assert found.headline == "made no progress and ended itself" and found.may_pass
    assert [f.rank for f in failures({0: 1, 2: -signal.SIGSEGV}, tmp_path)] == [2, 0]


def test_before_a_rank_is_started_a_job_can_be_put_off():
    code = "import os, signal; from megatsp import launcher\n"
    code += "with launcher.requeued(): os.kill(os.getpid(), signal.SIGTERM)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT_S)
    assert (ended.returncode, ended.stderr) == (75, "megatsp: SIGTERM before a rank was started\n")


def test_what_comes_after_a_second_sigterm_does_not_soften_it():
    killed: list[int] = []
    with restored():
        signals = Signals((), lambda: killed.append(1))
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signals._hear(number, None)
    assert signals.is_hard and killed


def test_a_stop_after_a_request_to_save_is_the_first_stop():
    killed: list[int] = []
    with restored():
        signals = Signals((), lambda: killed.append(1))
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signals._hear(number, None)
    assert signals.first == signal.SIGUSR1 and not signals.is_hard and not killed
