"""Real jobs end as they should: interrupted, with a rank killed, and under torchrun."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from runs import command, overrides, write_corpus
from waiting import LIMIT_S, wait_until

from megatsp.training.logs import read_metrics

TWO_RANKS = ("parallel.tsp=2", "launch.nproc=2", "trainer.micro_batch_size=4")


@pytest.fixture
def start(tmp_path: Path):
    """Starts `megatsp train` on the corpus of this test; what still runs at its end is killed."""
    write_corpus(tmp_path / "corpus")
    jobs: list[subprocess.Popen] = []

    def start_job(*more: str, **options) -> subprocess.Popen:
        jobs.append(command("train", *overrides(tmp_path / "corpus", tmp_path, *TWO_RANKS, *more), **options))
        return jobs[-1]

    yield start_job
    for job in jobs:
        job.kill()
        job.communicate()


def metrics(folder: Path) -> list[dict]:
    path = folder / "run" / "metrics.jsonl"
    return read_metrics(path) if path.exists() else []


def wait_for_steps(folder: Path, job: subprocess.Popen) -> None:
    """Until three iterations are logged."""
    wait_until(lambda: len(metrics(folder)) >= 3 or job.poll() is not None, "three iterations")
    assert job.poll() is None, job.communicate()


def processes(folder: Path) -> dict[int, str]:
    """The rank ("" for the launcher and the ranks' server) of every process started on this test's folder."""
    found = {}
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and str(folder).encode() in (process / "cmdline").read_bytes():
                name = (process / "comm").read_text().strip()
                found[int(process.name)] = name.removeprefix("rank ") if name.startswith("rank ") else ""
        except (FileNotFoundError, ProcessLookupError):
            pass  # it has ended meanwhile
    return found


def test_interrupted_it_saves_and_the_same_command_completes(start, tmp_path):
    job = start("trainer.train_iters=1000000")
    wait_for_steps(tmp_path, job)
    job.send_signal(signal.SIGINT)
    out, err = job.communicate(timeout=LIMIT_S)
    assert job.returncode == 0, err
    assert err.strip() == "megatsp: finishing this step; Ctrl-C again aborts"
    stopped = metrics(tmp_path)[-1]["iteration"]
    assert stopped >= 3
    assert f" interrupted: stopped after iteration {stopped}; the same command resumes\n" in out
    pointer = tmp_path / "run" / "checkpoints" / "latest_checkpointed_iteration.txt"
    assert pointer.read_text() == f"{stopped}\n" and processes(tmp_path) == {}

    last = stopped + 5  # the same command, but that it comes to an end
    job = start(f"trainer.train_iters={last}")
    out, err = job.communicate(timeout=LIMIT_S)
    assert (job.returncode, err) == (0, "")
    assert f"resumed after iteration {stopped}; " in out
    steps = [entry["iteration"] for entry in metrics(tmp_path) if "lm loss" in entry]
    assert steps == list(range(1, last + 1)) and pointer.read_text() == f"{last}\n"


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the ranks in /proc")
def test_a_killed_rank_ends_the_job_and_is_named(start, tmp_path):
    job = start("trainer.train_iters=1000000", "launch.max_restarts=0")
    wait_for_steps(tmp_path, job)
    running = processes(tmp_path)
    assert sorted(running.values()) == ["", "", "0", "1"]
    os.kill(next(pid for pid, rank in running.items() if rank == "1"), signal.SIGKILL)
    _, err = job.communicate(timeout=LIMIT_S)
    assert job.returncode == 137
    assert err.startswith("megatsp: error: rank 1: killed by SIGKILL\n")
    assert processes(tmp_path) == {}


def test_under_torchrun_it_joins(start, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    job = start("trainer.train_iters=3", prefix=[*torchrun, "-m", "megatsp"])
    out, err = job.communicate(timeout=LIMIT_S)
    assert job.returncode == 0, err
    assert "on dp_replicate 1 x dp_shard 1 x cp 1 x tsp 2 x tp 1 (cpu)\n" in out
    losses = [entry["iteration"] for entry in metrics(tmp_path) if "checkpoint/save-s" not in entry]
    assert losses == [1, 2, 3, 3]
    assert (tmp_path / "run" / "checkpoints" / "iter_0000003" / "state.json").is_file()
