"""A hang ends every rank in time, with its stacks, how far each got, and the rank that is to blame named."""

import ctypes
import os
import re
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed import run_distributed
from wandb_files import parsed, rows

from megatsp.comm import Comm, Traffic
from megatsp.schema import Config, LoggingConfig
from megatsp.training.events import read_objects
from megatsp.training.logs import Reporter
from megatsp.training.watchdog import Watchdog, summary

TIMEOUT_S = 3.0


def hang(folder: Path, how: str) -> None:
    """On a rank: three steps of beats and collectives, after which rank 1 does not come to the fourth."""
    stderr = os.open(folder / f"stderr{dist.get_rank()}", os.O_WRONLY | os.O_CREAT)
    os.dup2(stderr, 2)
    traffic = Traffic()

    def slowly(text: str) -> None:
        time.sleep(0.3)
        (folder / "alert").write_text(text)

    with Watchdog(folder, TIMEOUT_S, traffic) as watchdog:
        watchdog.on_hang = slowly
        comm = Comm(dist.group.WORLD, traffic)
        for step in range(4):
            watchdog.beat(f"step {step}")
            if step == 3 and dist.get_rank() == 1:
                (folder / "since").write_text(str(time.time()))
                if how == "stopped":
                    os.kill(os.getpid(), signal.SIGSTOP)
                elif how == "locked":
                    ctypes.PyDLL(None).sleep(60)  # and nothing else of Python runs
                time.sleep(60)
            comm.all_reduce(torch.ones(5), "test").wait()


def run_hang(folder: Path, how: str) -> tuple[str, float]:
    """The failure that the parent sees, and how long rank 0 hung."""
    with pytest.raises(AssertionError) as failure:
        run_distributed(hang, 2, folder, how)
    return str(failure.value), time.time() - float((folder / "since").read_text())


def read(folder: Path, name: str) -> str:
    return next((folder / "hangs").glob(f"*/{name}")).read_text()


def test_a_rank_that_does_not_come_is_found(tmp_path):
    failure, seconds = run_hang(tmp_path, "sleeps")
    assert "died with exit code 76" in failure and seconds < TIMEOUT_S + 1
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
    failure, seconds = run_hang(tmp_path, "stopped")
    assert "rank 0 of 2 failed:\nit died with exit code 76" in failure and seconds < TIMEOUT_S + 1
    said = (tmp_path / "stderr0").read_text()
    assert "rank 1 wrote nothing" in said and "likely culprit: rank 1\n" in said


def test_a_rank_that_holds_pythons_lock_ends_too(tmp_path):
    failure, seconds = run_hang(tmp_path, "locked")
    assert "rank 1 of 2 failed:\nit died with exit code 1" in failure and seconds < TIMEOUT_S + 1
    said = (tmp_path / "stderr1").read_text()
    assert "most recent call first" in said and "in hang" in said
    assert "likely culprit: rank 1\n" in (tmp_path / "stderr0").read_text()


def hang_alone(folder: Path, how: str) -> None:
    """On a rank, which reports: three steps, and no fourth."""
    config = replace(Config(), logging=LoggingConfig(wandb="offline"))
    with Watchdog(folder, TIMEOUT_S) as watchdog:
        reporter = Reporter(config, folder, 0, "", active=True)
        if how == "reports":
            watchdog.on_hang = reporter.hang
        elif how == "hangs too":
            watchdog.on_hang = lambda text: time.sleep(60)
        else:
            watchdog.on_hang = lambda text: 1 / 0
        for iteration in (1, 2, 3):
            watchdog.beat(f"step {iteration}")
            reporter.log(iteration, {"lm loss": 1.0})
            reporter.advance()
        (folder / "since").write_text(str(time.time()))
        time.sleep(60)


@pytest.mark.parametrize("how", ["reports", "hangs too", "fails"])
def test_what_a_hang_is_told_to_does_not_delay_the_end(tmp_path, how):
    with pytest.raises(AssertionError, match="died with exit code 76"):
        run_distributed(hang_alone, 1, tmp_path, how)
    assert time.time() - float((tmp_path / "since").read_text()) < TIMEOUT_S + 1
    if how != "reports":
        return
    (event,) = read_objects(tmp_path / "events.jsonl")
    assert (event["kind"], event["iteration"]) == ("hang", 3) and "rank 0: step 3" in event["text"]
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    (alert,) = [record.alert for record in parsed(file) if record.WhichOneof("record_type") == "alert"]
    assert (alert.title, alert.level) == ("hang: run", "ERROR") and "no progress" in alert.text
    assert [step for step, _ in rows(file)] == [1, 2]  # the third may not be all: the next start gives it


def test_beats_keep_it_quiet_and_zero_watches_nothing(tmp_path):
    with Watchdog(tmp_path, 0.4) as watchdog:
        for _ in range(16):
            watchdog.beat("a step")
            time.sleep(0.05)
    with Watchdog(tmp_path, 0):
        assert not any(thread.name == "watchdog" for thread in threading.enumerate())
    time.sleep(0.5)  # and nothing fires later
    assert list(tmp_path.iterdir()) == []


def test_summary_of_ranks_that_all_wait():
    states = {rank: {"what": "step 3", "quiet_s": 9.0, "collectives": {"0": 7}} for rank in range(3)}
    assert "none stands out" in summary(states, 3, Path("hangs"))
    states[2]["collectives"] = {"0": 6}
    assert "culprit: rank 2 (rank 2 posted 6 collectives in group 0, others 7)" in summary(
        states, 3, Path("hangs")
    )
