"""Jobs on a real Slurm of four nodes: they train, requeue, lose nodes, are refused, and end for good.

A test that must catch a job in the middle of its training stops its ranks (SIGSTOP) once they have begun, and
lets them go on when what it waits for has happened: nothing depends on how fast a machine is.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from runs import ROOT, losses, overrides, train_on_ranks, write_corpus
from safetensors.numpy import load_file
from slurm import Cluster, cluster, ranks_of, signal_ranks, tasks_on
from waiting import LIMIT_S
from wandb_files import all_rows

from megatsp.jobs.attempts import Attempt, read_attempts
from megatsp.training.logs import read_metrics

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="Slurm's daemons are started by root"),
    pytest.mark.timeout(3 * LIMIT_S),
]

MESH = ("launch.nodes=2", "launch.nproc=2", "parallel.tsp=2")
ITERATIONS = 30


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("slurm") / "cluster", nodes=4, cpus=4) as running:
        yield running


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "c")


class Run:
    """A run of a job on the cluster, or of a task of an array, whose job is the task's own number."""

    def __init__(self, slurm: Cluster, folder: Path, job: str) -> None:
        self.slurm, self.folder, self.job = slurm, folder, job
        self.job_folder = folder / "slurm" / f"job_{job}"

    @property
    def attempts(self) -> list[Attempt]:
        return read_attempts(self.job_folder)

    @property
    def log(self) -> str:
        return (self.folder / "slurm" / f"job_{self.job}.log").read_text()

    def attempt(self, number: int) -> Path:
        return self.job_folder / f"attempt_{number}"

    def reach(self, iteration: int) -> None:
        """Waits until so many iterations are logged."""

        def has() -> bool:
            metrics = self.folder / "metrics.jsonl"
            return metrics.is_file() and any(e["iteration"] >= iteration for e in read_metrics(metrics))

        self.slurm.wait(has, f"iteration {iteration} of {self.folder.name}", pause_s=0.01)

    def pause(self, number: int, iteration: int) -> None:
        """Stops the ranks of an attempt once they have got so far."""
        self.reach(iteration)
        signal_ranks(self.attempt(number), signal.SIGSTOP)

    def go_on(self, number: int) -> None:
        signal_ranks(self.attempt(number), signal.SIGCONT)

    def is_asked(self, number: int) -> bool:
        """Whether SIGUSR1 waits for the ranks of an attempt, which are stopped."""
        pending = [
            (Path("/proc") / str(pid) / "status").read_text() for pid in ranks_of(self.attempt(number))
        ]
        masks = [
            int(line.split()[1], 16) for text in pending for line in text.splitlines() if "ShdPnd" in line
        ]
        return bool(masks) and all(mask >> (signal.SIGUSR1 - 1) & 1 for mask in masks)


@pytest.fixture
def start(slurm: Cluster, corpus: Path, tmp_path: Path):
    """Submits a tiny run; its job is cancelled in the end, and lost nodes come back."""
    started: list[Run] = []

    def submit(*more: str) -> Run:
        folder = tmp_path / "my runs"
        arguments = overrides(corpus, folder, *MESH, f"trainer.train_iters={ITERATIONS}", *more)
        started.append(Run(slurm, folder / "run", slurm.submit(*arguments)))
        return started[-1]

    yield submit
    for run in started:
        slurm.ask("scancel", run.job)
        slurm.finish(run.job)


def weights(run: Path) -> dict[str, np.ndarray]:
    """What the last checkpoint's files hold, file by file."""
    files = sorted((run / "checkpoints" / f"iter_{ITERATIONS:07d}").glob("*.safetensors"))
    assert files
    return {f"{file.name}/{name}": value for file in files for name, value in load_file(file).items()}


def test_a_job_trains_and_finishes(start, slurm: Cluster) -> None:
    run = start("launch.preflight=full", "launch.spare_nodes=1", "launch.profile=cpu")
    assert slurm.finish(run.job) == "COMPLETED"
    (attempt,) = run.attempts
    assert (attempt.action, attempt.iteration, len(attempt.nodes)) == ("done", ITERATIONS, 3)
    assert [entry["iteration"] for entry in read_metrics(run.folder / "metrics.jsonl")][-1] == ITERATIONS
    assert (run.attempt(0) / "nodes.txt").read_text().split() == list(attempt.nodes[:2])
    logs = sorted(path.name for path in run.attempt(0).glob("rank_*.log"))
    assert logs == [f"rank_{rank:05d}.log" for rank in range(4)]
    assert "environment: OMP_NUM_THREADS" in (run.attempt(0) / "rank_00000.log").read_text()
    assert "roll call: " in run.log and "GEMM" in run.log
    said = slurm.megatsp("launch", "status", str(run.folder)).stdout
    assert f"job {run.job}  COMPLETED" in said and f"checkpoint: iteration {ITERATIONS}" in said
    assert "iteration       30/      30" in slurm.megatsp("launch", "logs", run.job).stdout


@pytest.mark.slow
def test_a_job_of_one_rank_trains_and_finishes(start, slurm: Cluster) -> None:
    one = ("launch.nodes=1", "launch.nproc=1", "parallel.tsp=1", "launch.slurm.tasks=gpu")
    run = start(*one, "launch.preflight=full")
    assert slurm.finish(run.job) == "COMPLETED", run.log
    (attempt,) = run.attempts
    assert (attempt.action, attempt.iteration) == ("done", ITERATIONS)
    assert (run.attempt(0) / "preflight.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("tasks", ["node", "gpu"])
def test_a_time_limit_requeues_to_the_bitwise_same_end(
    tasks: str, start, slurm: Cluster, corpus: Path, tmp_path: Path
) -> None:
    more = (f"launch.slurm.tasks={tasks}", "launch.preflight=none", "logging.wandb=offline")
    run = start("launch.slurm.signal_s=30", *more)
    run.pause(0, iteration=5)
    slurm.ask("scontrol", "update", f"JobId={run.job}", "TimeLimit=1")
    slurm.wait(lambda: run.is_asked(0), "Slurm's signal reaches the ranks")  # of the time limit
    run.go_on(0)
    slurm.hurry(run.job)
    slurm.wait(lambda: len(run.attempts) == 2, "the second attempt")
    run.pause(1, iteration=run.attempts[1].iteration_before + 5)
    slurm.ask("scancel", "--batch", "--signal=USR1", run.job)
    slurm.wait(lambda: run.is_asked(1), "the signal reaches the ranks")
    run.go_on(1)
    slurm.hurry(run.job)
    assert slurm.finish(run.job) == "COMPLETED"
    assert [attempt.action for attempt in run.attempts] == ["requeue", "requeue", "done"]
    assert [attempt.restart for attempt in run.attempts] == [0, 1, 2]
    assert run.log.count("requeue: Slurm asked it to end (USR1)") == 2

    rows = all_rows(run.folder)  # of W&B's three offline files
    assert [step for step, _ in rows] == list(range(1, ITERATIONS + 1))
    assert len({path.name for path in (run.folder / "wandb").glob("offline-run-*/*.wandb")}) == 1

    whole = overrides(corpus, tmp_path / "whole", "parallel.tsp=2", f"trainer.train_iters={ITERATIONS}")
    (expected,) = train_on_ranks(4, whole)
    entries = read_metrics(run.folder / "metrics.jsonl")
    assert [e["iteration"] for e in entries if "lm loss" in e] == list(range(1, ITERATIONS + 1))
    assert losses(entries) == losses(expected)
    found, reference = weights(run.folder), weights(tmp_path / "whole" / "run")
    assert found.keys() == reference.keys()
    for name, value in found.items():
        np.testing.assert_array_equal(value, reference[name], err_msg=name)


@pytest.mark.slow
def test_a_save_that_the_time_limit_cuts_off_is_made_up_for(start, slurm: Cluster) -> None:
    run = start("launch.nodes=1", "launch.preflight=none", "checkpoint.save_interval=2")
    run.pause(0, iteration=5)
    slurm.ask("scontrol", "update", f"JobId={run.job}", "TimeLimit=1")
    slurm.hurry(run.job)
    assert slurm.finish(run.job) == "COMPLETED"
    first, last = run.attempts
    assert (first.action, last.action, last.iteration) == ("requeue", "done", ITERATIONS)
    assert first.iteration >= 2


@pytest.mark.slow
def test_a_lost_node_is_kept_off_though_it_comes_back(start, slurm: Cluster) -> None:
    run = start("launch.preflight=quick", "checkpoint.save_interval=2", "launch.restart_backoff_s=0")
    run.pause(0, iteration=5)
    lost = run.attempts[0].nodes[1]
    slurm.lose(lost)
    try:
        slurm.wait(
            lambda: "down" in slurm.ask("sinfo", "-h", "-n", lost, "-p", "all", "-o", "%t"), "it is down"
        )
        slurm.bring_back(lost)  # before the attempt ends, whose ranks are stopped
        slurm.wait(lambda: run.attempts[0].action, "the loss is noticed")
    finally:
        signal_ranks(run.attempt(0), signal.SIGKILL)  # those of the lost node, which nobody else ends
    assert slurm.finish(run.job, hurries=True) == "COMPLETED"
    one, two = run.attempts
    assert (one.action, one.cause, one.away) == ("requeue", f"lost {lost}", (lost,))
    assert two.action == "done" and lost not in two.nodes
    assert two.iteration_before >= 4 and two.iteration == ITERATIONS


@pytest.mark.slow
def test_a_spare_node_takes_the_place_of_a_lost_one(start, slurm: Cluster) -> None:
    run = start("launch.spare_nodes=1", "launch.preflight=quick", "launch.restart_backoff_s=0")
    run.pause(0, iteration=5)
    lost = run.attempts[0].nodes[1]
    slurm.lose(lost)
    try:
        assert slurm.finish(run.job) == "COMPLETED"
    finally:
        signal_ranks(run.attempt(0), signal.SIGKILL)
        slurm.bring_back(lost)
    first, last = run.attempts
    assert (first.action, first.away) == ("again", (lost,))
    assert (last.action, last.restart, lost in last.nodes) == ("done", 0, False)


@pytest.mark.slow
def test_a_node_whose_preflight_dies_is_replaced(start, slurm: Cluster) -> None:
    run = start("launch.spare_nodes=1", "launch.preflight=full", "launch.restart_backoff_s=0")
    slurm.wait(lambda: run.job_folder.is_dir() and run.attempts, "the attempt")
    node = run.attempts[0].nodes[1]
    slurm.wait(lambda: tasks_on(node, "megatsp", "preflight"), "the preflight")
    os.kill(max(tasks_on(node, "megatsp", "preflight")), signal.SIGSEGV)
    assert slurm.finish(run.job) == "COMPLETED", run.log
    first, last = run.attempts
    assert (first.action, first.away) == ("again", (node,)), first
    assert (last.action, node in last.nodes) == ("done", False)


@pytest.mark.slow
def test_the_same_death_twice_stops_the_job_with_the_reason(start, slurm: Cluster) -> None:
    run = start("launch.nodes=1", "launch.preflight=none", "launch.restart_backoff_s=0")
    for number in (0, 1):
        slurm.wait(lambda n=number: len(run.attempts) > n, "the attempt")  # type: ignore[misc]
        slurm.wait(lambda n=number: len(ranks_of(run.attempt(n))) == 2, "its ranks")  # type: ignore[misc]
        os.kill(max(ranks_of(run.attempt(number))), signal.SIGKILL)
    assert slurm.finish(run.job) == "FAILED"
    assert [attempt.action for attempt in run.attempts] == ["again", "stop"]
    assert "killed by SIGKILL" in run.attempts[1].cause
    assert "stop: the same failure twice in a row, without a new checkpoint" in run.log
    said = slurm.megatsp("launch", "logs", str(run.folder)).stdout
    assert said.startswith("==> first to fail, in attempt 1: rank ") and "killed by SIGKILL" in said
    assert "first to fail, in attempt 1: rank" in slurm.megatsp("launch", "status", str(run.folder)).stdout


def test_a_users_mistake_ends_the_job_at_once(start, slurm: Cluster, tmp_path: Path) -> None:
    run = start("launch.nodes=1", "launch.preflight=none", f"data.path={tmp_path}/missing")
    assert slurm.finish(run.job) == "FAILED"
    (attempt,) = run.attempts
    assert (attempt.action, slurm.facts(run.job)["ExitCode"]) == ("stop", "2:0")
    assert "error: " in run.log and f"{tmp_path}/missing" in run.log and "Traceback" not in run.log


def test_cancelling_saves_and_does_not_come_back(start, slurm: Cluster) -> None:
    run = start("launch.nodes=1", "launch.preflight=none", "launch.slurm.tasks=gpu")
    run.pause(0, iteration=5)
    result = slurm.megatsp("launch", "cancel", str(run.folder))
    assert result.returncode == 0 and "saves and ends" in result.stdout
    slurm.wait(lambda: run.is_asked(0), "the signal reaches the ranks")
    run.go_on(0)
    assert slurm.finish(run.job) == "FAILED"  # by its exit status, 130
    (attempt,) = run.attempts
    assert attempt.action == "stop" and 5 <= attempt.iteration < ITERATIONS
    again = slurm.megatsp("launch", "cancel", str(run.folder))
    assert again.returncode == 2 and "is over" in again.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("array", "name"), [((), "plain"), (("--array=3",), "plain%a")])
def test_plain_sbatch_does_the_same(slurm: Cluster, corpus: Path, tmp_path: Path, array, name) -> None:
    options = [
        *array,
        "--nodes=2",
        "--ntasks-per-node=1",
        "--gpus-per-node=1",
        f"--output={tmp_path}/job.log",
    ]
    more = (
        "launch.preflight=quick",
        "launch.device=cpu",
        "parallel.tsp=1",
        "model=gpt_tiny",
        "trainer=default",
    )
    run = overrides(corpus, tmp_path, *more, f"trainer.train_iters={ITERATIONS}", f"name={name}")
    environment = slurm.environment | {"PYTHON": sys.executable}
    said = subprocess.run(
        ["sbatch", "--parsable", *options, str(ROOT / "launch" / "pretrain.sbatch"), *run],
        env=environment, check=True, capture_output=True, text=True, timeout=LIMIT_S,
    ).stdout  # fmt: skip
    job = said.strip() + "_3" * len(array)
    assert slurm.finish(job) == "COMPLETED", (tmp_path / "job.log").read_text()
    assert "attempt 0: done" in (tmp_path / "job.log").read_text()
    shown = slurm.megatsp("launch", "status", str(tmp_path / name.replace("%a", "3"))).stdout
    assert f"job {job}  COMPLETED" in shown and f"checkpoint: iteration {ITERATIONS}" in shown


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["launch.slurm.partition=nope"], "invalid partition specified: nope"),
        (["launch.nodes=8", "trainer.global_batch_size=16"], "Batch job submission failed"),
        (
            ["launch.slurm.gpu_request=none", "launch.slurm.options=['--gpus-per-node=9']"],
            "Batch job submission failed: Requested node configuration is not available",
        ),
        (["launch.slurm.partition=short", "launch.slurm.time=5:00:00"], "Batch job submission failed"),
    ],
)
def test_slurms_own_refusals_are_shown_at_submission(more, message, slurm, corpus, tmp_path) -> None:
    result = slurm.megatsp("launch", "slurm", *overrides(corpus, tmp_path, *MESH, *more))
    assert result.returncode == 2
    assert result.stderr.startswith("megatsp: error: Slurm refused the job:") and message in result.stderr


def test_status_of_what_is_no_job_is_an_error(slurm: Cluster, tmp_path: Path) -> None:
    for given, message in ((str(tmp_path), "has no jobs"), ("4711", "knows no job 4711")):
        result = slurm.megatsp("launch", "status", given)
        assert result.returncode == 2 and message in result.stderr


@pytest.mark.slow
def test_a_task_of_an_array_requeues_alone(start, slurm: Cluster) -> None:
    one = ("launch.nodes=1", "launch.preflight=none", "checkpoint.save_interval=2")
    array = start(*one, "--array", "1-2", "name=task%a", "trainer.seed=%a")
    for task in "12":
        slurm.wait(lambda name=f"{array.job}_{task}": slurm.state(name) == "RUNNING", "it runs")  # type: ignore[misc]
    own = {task: slurm.facts(f"{array.job}_{task}")["JobId"] for task in "12"}
    runs = {task: Run(slurm, array.folder.parent / f"task{task}", own[task]) for task in "12"}
    for run in runs.values():
        run.pause(0, iteration=3)
    last = "1" if own["1"] == array.job else "2"  # whose plain number means the whole array
    other = "12".replace(last, "")
    slurm.ask("scancel", "--batch", "--signal=USR1", f"{array.job}_{last}")
    slurm.wait(lambda: runs[last].is_asked(0), "the signal reaches the ranks")
    assert not runs[other].is_asked(0)
    runs[last].go_on(0)
    slurm.wait(lambda: runs[last].attempts[0].action == "requeue", "it is requeued")
    slurm.wait(lambda: slurm.facts(f"{array.job}_{last}")["Restarts"] == "1", "Slurm does so")
    assert slurm.state(f"{array.job}_{other}") == "RUNNING"
    asked = slurm.megatsp("launch", "status", array.job)
    assert asked.returncode == 2 and f"is an array: give one of its tasks, {array.job}_1" in asked.stderr
    shown = slurm.megatsp("launch", "status", own[other]).stdout
    assert f"job {array.job}_{other}  RUNNING" in shown and "attempt 0" in shown
    cancelled = slurm.megatsp("launch", "cancel", array.job)
    assert cancelled.returncode == 0, cancelled.stderr
    assert f"job {array.job}_{other} saves and ends" in cancelled.stdout
    assert f"job {array.job}_{last} is cancelled" in cancelled.stdout
    runs[other].go_on(0)
    assert slurm.finish(f"{array.job}_{last}") == "CANCELLED"
    assert slurm.finish(f"{array.job}_{other}") == "FAILED"  # by its exit status, 130
    (attempt,) = runs[other].attempts
    assert (attempt.action, attempt.restart) == ("stop", 0)
    said = slurm.megatsp("launch", "status", str(runs[other].folder)).stdout
    assert f"job {array.job}_{other}  FAILED" in said and "stop" in said
