"""Runs that are asked to end: wherever they are, all ranks agree, and a resumed run shows nothing of it."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_distributed
from runs import StopIf, full_state, overrides, start_training, write_corpus
from waiting import hang

from megatsp.checkpoint import saver
from megatsp.checkpoint.paths import LATEST
from megatsp.compose import compose
from megatsp.exit_status import REQUEUE
from megatsp.schema import Config
from megatsp.training import stopping
from megatsp.training.logs import read_metrics
from megatsp.training.run import Training
from megatsp.training.stopping import LIMIT, CutOff, Stop, Stopper

STEPS = ["trainer.train_iters=6", "trainer.eval_interval=2", "trainer.eval_iters=2", "parallel.tsp=2"]
TEST = ["data.test_fraction=0.25", "checkpoint.save_interval=4"]


class Places:
    """Where a run is, by its watchdog's beats."""

    def __init__(self, training: Training) -> None:
        self.at: list[tuple[str, int]] = []
        training.beat = lambda what: self.at.append((what, training.state.iteration))


def run_and_stop(config: Config, place: tuple[str, int] | None) -> dict[str, Any]:
    """On a rank: a run, of which rank 1 is asked to stop at a place."""
    training = start_training(config)
    places = Places(training)
    is_asked = torch.distributed.get_rank() == 1
    stopper = StopIf(lambda: is_asked and (place == ("start", 0) or place in places.at))
    status = training.run(stopper)
    return {"status": status, "state": training.state, "stop": stopper.stop, "tensors": full_state(training)}


def run_all(jobs: list[tuple[Config, tuple[str, int] | None]], unwritable: Config) -> list[dict[str, Any]]:
    found = [run_and_stop(*job) for job in jobs]
    write = saver.store.write

    def fail(checkpoints: Path, state: Any, *rest: Any) -> Any:
        if state.iteration == 6:
            raise ValueError("cannot write: No space left on device")
        return write(checkpoints, state, *rest)

    saver.store.write = fail  # type: ignore[assignment]
    found.append(run_and_stop(unwritable, None))
    saver.store.write = write
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stopping")
    write_corpus(folder / "corpus")
    return folder


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, dict[str, Any]]:
    """By name of the run and number of its start, all on one start of two ranks."""
    jobs: dict[str, tuple[str, int] | None] = {
        "whole": None,
        "start 1": ("start", 0),
        "start 2": None,
        "parts 1": ("a batch of val", 4),
        "parts 2": ("a batch of test", 6),
        "parts 3": None,
        "parts 4": None,
    }
    configs = [
        compose(overrides(folder / "corpus", folder, f"name={name.split()[0]}", *STEPS, *TEST))
        for name in (*jobs, "unwritable")
    ]
    places = list(zip(configs, jobs.values(), strict=False))
    results = run_distributed(run_all, 2, places, configs[-1])
    return dict(zip((*jobs, "unwritable"), results[0], strict=True))


def logged(folder: Path, name: str) -> list[dict[str, Any]]:
    """What does not depend on the clock."""
    exact = ("iteration", "consumed-tokens", "lm loss", "grad-norm", "val/lm loss", "test/lm loss")
    entries = read_metrics(folder / name / "metrics.jsonl")
    return [{k: e[k] for k in exact if k in e} for e in entries if "checkpoint/save-s" not in e]


def test_a_request_during_start_up_ends_before_the_first_step(runs, folder):
    stopped = runs["start 1"]
    assert (stopped["status"], stopped["state"].iteration) == (REQUEUE, 0)
    assert stopped["stop"].heard == ((), ("SIGTERM",))
    assert runs["start 2"]["status"] == 0 and logged(folder, "start") == logged(folder, "whole")


def test_a_request_in_an_evaluation_cuts_it_off_and_the_resumed_run_does_it_first(runs, folder):
    first, second, third = (runs[f"parts {i}"] for i in (1, 2, 3))
    assert first["status"] == REQUEUE
    assert (first["state"].iteration, first["state"].evaluated_at) == (4, 2)
    assert second["status"] == REQUEUE  # the steps are done, but not the evaluation after them
    assert (second["state"].iteration, second["state"].evaluated_at) == (6, 4)
    assert third["status"] == 0 and third["state"].evaluated_at == 6
    assert logged(folder, "parts") == logged(folder, "whole")
    assert all(torch.equal(t, runs["whole"]["tensors"][name]) for name, t in third["tensors"].items())
    assert runs["parts 4"]["status"] == 0  # it is over, and says so
    assert logged(folder, "parts")[-1].keys() >= {"test/lm loss"}


def test_a_last_checkpoint_that_cannot_be_written_fails_the_run(runs, folder):
    assert runs["unwritable"]["status"] == 74
    checkpoints = folder / "unwritable" / "checkpoints"
    assert (checkpoints / LATEST).read_text() == "4\n" and (checkpoints / "iter_0000004").is_dir()


def test_signals_are_noted_and_given_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    with Stopper() as stopper:
        assert not stopper.asked()
        for number in (signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), number)
        assert stopper.asked() and stopper.heard == ["SIGTERM", "SIGUSR1"]
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == before


def test_the_limit_counts_from_the_start_of_the_process(monkeypatch):
    monkeypatch.delenv("MEGATSP_LAUNCHER_PID", raising=False)
    stopper = Stopper()
    stopper.limit_to(0)
    assert not stopper.asked()
    stopper.limit_to(1e6)
    assert not stopper.asked()
    stopper.limit_to(1e-4)
    assert stopper.asked() and stopper.heard == [LIMIT]


def test_the_limit_counts_from_the_start_of_torchrun(monkeypatch):
    monkeypatch.delenv("MEGATSP_LAUNCHER_PID", raising=False)
    own = stopping._running_s()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run1")
    monkeypatch.setattr(os, "getppid", lambda: 1)  # which may start ranks again
    since_boot = time.clock_gettime(time.CLOCK_BOOTTIME)
    assert own < stopping._running_s() <= since_boot


def test_what_works_alone_is_cut_off_by_a_signal_or_the_limit(monkeypatch):
    monkeypatch.delenv("MEGATSP_LAUNCHER_PID", raising=False)
    with Stopper() as stopper:
        with pytest.raises(CutOff), stopper.cutting_off():
            os.kill(os.getpid(), signal.SIGTERM)
            hang()
        with pytest.raises(CutOff), stopper.cutting_off():  # it was heard before
            raise AssertionError
    with Stopper() as stopper:
        monkeypatch.setattr(stopping, "_running_s", lambda: 60.0)
        stopper.limit_to(60.1 / 60)
        with pytest.raises(CutOff), stopper.cutting_off():
            assert stopper.heard == []  # the limit comes inside
            hang()
        assert stopper.heard == [LIMIT]


def test_the_exit_status_and_its_line_say_who_heard_what():
    stop = Stop(((), ("SIGTERM", LIMIT), ("SIGTERM",)))
    assert stop.status == REQUEUE
    assert stop.line(75) == (
        " heard SIGTERM on ranks 1, 2; trainer.exit_duration_in_mins on rank 1: exit status 75, to be "
        "started again"
    )
    assert Stop((("SIGINT",), ("SIGTERM",))).status == 0  # Ctrl-C: somebody who wants no other start
