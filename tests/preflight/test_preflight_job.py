"""Ranks of a job that fail: who is named, what is left for the job's judge, with which status they end."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from runs import RANK_VARIABLES, ROOT, TINY
from waiting import LIMIT_S, free_port

from megatsp.exit_status import FAILURE, HARDWARE, USER_ERROR
from megatsp.launcher.failures import Failure
from megatsp.launcher.outcome import read_outcomes
from megatsp.preflight.files import write_names

TWO_NODES = ("launch.nodes=2", "parallel.dp_shard=2")
# A rank with a fault: the command, after something of it was replaced.
FAULTY = """
import pathlib, sys, threading, time, torch
from dataclasses import replace
from types import SimpleNamespace
from megatsp import cli
from megatsp.preflight import examine, guard, measure, presence, rank as work
rank, mark = int(sys.argv[1]), pathlib.Path(sys.argv[2])
measured, run = examine.measure_transfer, measure._run
work._LIMIT_S = 1.0
late = ""  # the measurement that does not end
def sleep():
    mark.touch()
    time.sleep(3600)
class Timer(threading.Timer):
    # Runs from when a rank sleeps in this measurement: another one has time, however slow the machine is.
    def run(self):
        while not (late and self.args[0].startswith(late) and self.is_due()):
            if self.finished.wait(0.02):
                return
        super().run()
    def is_due(self):
        return mark.exists()
guard.threading = SimpleNamespace(Timer=Timer)
{fault}
sys.exit(cli.main(sys.argv[3:]))
"""
ASLEEP_IN_A_HOP = """
def asleep(transfer, comm, bench):
    if rank == 1 and transfer.what.startswith("hop"):
        sleep()
    return measured(transfer, comm, bench)
examine.measure_transfer = asleep
late = "hop"
if rank == 1:  # whose own time is up when rank 0 has said so
    Timer.is_due = lambda timer: any(mark.parent.glob("outcome_*.json"))
"""
ASLEEP_IN_A_GROUP = """
def asleep(operation, given, comm):
    if rank == 2 and comm.size == 3 and operation == "all_gather":
        sleep()
    return run(operation, given, comm)
measure._run = asleep
late = "embedding's weights"
"""
RAISES_IN_A_GROUP = """
def raising(operation, given, comm):
    if rank == 1 and operation == "all_gather":
        raise torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered")
    return run(operation, given, comm)
measure._run = raising
"""
NO_GPU_ON_NODE_1 = """
torch.cuda.is_available = lambda: rank != 1
presence._try_gpu = lambda local_rank: ("torch sees no GPU", "") if rank == 1 else ("", "0000:9a:00")
presence._gpu_facts = lambda known: {"gpus": 1}
"""
MEASURES_NOTHING = """
def found(config, places, needed, bench, judging, unfit):
    assert bench.device.type == "cuda"
    return examine.Found(["n0", "n1"], needed, verdict=examine.Verdict(unfit))
work.examine = found
"""
ONE_GPU_A_TASK = """
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
import os
os.environ["SLURM_LOCALID"] = "3"
"""
A_DRIVER_THAT_HANGS = """
late = "the first use"
Timer.is_due = lambda timer: rank == 1
torch.cuda.is_available = lambda: sleep() if rank == 1 else False
"""
ANOTHER_TORCH_ON_NODE_1 = """
presence.facts = lambda facts=presence.facts: {**facts(), "driver": f"6.{rank}"}
"""
PROFILE = """
about: of a test
variables:
  MEGATSP_TEST_VARIABLE: {value: "17", why: to see it}
"""


def environment(**more: str) -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k not in RANK_VARIABLES} | more


def run_in_job(
    folder: Path, *overrides: str, fault: str = "", nodes: int = 2, needed: int = 1, in_job: bool = True
) -> tuple[list[int], list[str], list[str]]:
    """Nodes of one rank, of which the job needs some: exit statuses, outputs, errors."""
    write_names(folder / "nodes.txt", [f"n{node}" for node in range(needed)])
    port = free_port()
    processes: list[subprocess.Popen[str]] = []
    try:
        for rank in range(nodes):
            task = environment(
                SLURM_STEP_ID="1", SLURM_NTASKS=str(nodes), SLURM_PROCID=str(rank), SLURM_LOCALID="0",
                SLURMD_NODENAME=f"n{rank}", MASTER_ADDR="localhost", MASTER_PORT=str(port),
            )  # fmt: skip
            program = FAULTY.format(fault=fault)
            processes.append(subprocess.Popen(
                [sys.executable, "-c", program, str(rank), str(folder / "asleep"),
                 "preflight", "--repeats", "1",
                 *(["--folder", str(folder)] if in_job else []), *TINY, *overrides],
                env=task, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            ))  # fmt: skip
        said = [process.communicate(timeout=LIMIT_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    outputs, errors = zip(*said, strict=True)
    return [process.returncode for process in processes], list(outputs), list(errors)


def hosts_of(outcomes: Sequence[Failure]) -> dict[str, int]:
    """Statuses by node."""
    return {one.host: one.status for one in sorted(outcomes, key=lambda one: one.rank)}


def test_the_ranks_of_a_job(tmp_path):
    """The results stand in its folder; the profile's variables are set, and told once."""
    profile = tmp_path / "profile.yaml"
    profile.write_text(PROFILE)
    statuses, outputs, errors = run_in_job(tmp_path, f"launch.profile={profile}")
    assert statuses == [0, 0], errors
    assert (tmp_path / "nodes.txt").read_text() == "n0\n"
    report = json.loads((tmp_path / "preflight.json").read_text())
    assert report["nodes"] == ["n0"] and report["spares"] == ["n1"]
    assert {m["where"] for m in report["measurements"]} == {"devices"}  # nothing of the run crosses nodes
    assert "the job runs on 1 node: n0, 1 more to spare" in outputs[0] and not outputs[1]
    assert outputs[0].count("MEGATSP_TEST_VARIABLE=17") == 1
    assert read_outcomes(tmp_path) == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("launch.nodes=3",), "2 nodes of 1 ranks, but the job has launch.nodes=3"),
        (("trainer.seq_lenght=3",), "seq_lenght"),
    ],
)
def test_a_mistake_that_all_ranks_of_a_job_make_is_told_once(tmp_path, overrides, message):
    statuses, _, errors = run_in_job(tmp_path, *overrides)
    assert statuses == [USER_ERROR] * 2
    assert errors[0].count("megatsp: error") == 1 and message in errors[0]
    assert "megatsp: error" not in errors[1]
    (outcome,) = read_outcomes(tmp_path)
    assert outcome.status == USER_ERROR and message in outcome.headline


def test_a_hop_that_does_not_end_suspects_both_ends(tmp_path):
    statuses, _, errors = run_in_job(tmp_path, *TWO_NODES, fault=ASLEEP_IN_A_HOP, nodes=3, needed=2)
    assert statuses[:2] == [HARDWARE] * 2 and statuses[2] != 0
    said = "n0, CPU rank 0, which waits for n1, CPU rank 0: hop to the next node has not ended in 1 s"
    assert f"megatsp: error: {said}" in errors[0]
    outcomes = read_outcomes(tmp_path)
    assert hosts_of(outcomes) == {"n0": HARDWARE, "n1": HARDWARE}
    assert all("hop to the next node has not ended in 1 s" in one.headline for one in outcomes)


def test_a_group_over_nodes_that_does_not_end_suspects_none_but_says_who_waits(tmp_path):
    overrides = ("launch.nodes=3", "parallel.dp_shard=3", "trainer.global_batch_size=6")
    statuses, _, errors = run_in_job(tmp_path, *overrides, fault=ASLEEP_IN_A_GROUP, nodes=3, needed=3)
    assert HARDWARE in statuses and 0 not in statuses
    assert "which waits for n" in "".join(errors) and "CPU rank 0: embedding's weights" in "".join(errors)
    assert {one.status for one in read_outcomes(tmp_path)} == {FAILURE}


def test_a_transfer_that_raises_suspects_its_node_alone(tmp_path):
    statuses, _, errors = run_in_job(tmp_path, *TWO_NODES, fault=RAISES_IN_A_GROUP, needed=2)
    assert statuses[1] == HARDWARE and statuses[0] != 0, errors
    (outcome,) = read_outcomes(tmp_path)
    assert outcome.host == "n1" and outcome.status == HARDWARE
    assert "n1, CPU rank 0: embedding's weights" in outcome.headline
    assert outcome.headline.endswith("CUDA error: uncorrectable ECC error encountered")
    assert "Traceback" in outcome.detail


def test_a_node_without_its_gpu_is_left_out_of_a_job(tmp_path):
    """auto does not make it a node of CPUs; nor does what it lacks end the job."""
    statuses, _, errors = run_in_job(
        tmp_path, "launch.device=auto", fault=NO_GPU_ON_NODE_1 + MEASURES_NOTHING
    )
    assert statuses == [HARDWARE] * 2, errors
    assert json.loads((tmp_path / "preflight.json").read_text())["bad"] == {"n1": ["torch sees no GPU"]}


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_node_without_its_gpu_is_named_outside_a_job(tmp_path, device):
    overrides = (f"launch.device={device}",)
    statuses, _, errors = run_in_job(tmp_path, *overrides, fault=NO_GPU_ON_NODE_1, in_job=False)
    assert statuses == [USER_ERROR] * 2
    assert f"launch.device={device}, but n1: torch sees no GPU" in errors[0]


def test_gpus_that_no_rank_of_a_job_has_are_a_mistake(tmp_path):
    statuses, _, errors = run_in_job(tmp_path, "launch.device=cuda")
    assert statuses == [USER_ERROR] * 2
    assert "n0: torch " in errors[0] and "sees no GPU; n1: torch" in errors[0]


def test_one_gpu_a_task_is_told_apart_from_too_few(tmp_path):
    statuses, _, errors = run_in_job(tmp_path, "launch.device=cuda", fault=ONE_GPU_A_TASK)
    assert statuses == [USER_ERROR] * 2
    assert "n0: 1 GPU for local rank 3: give launch.nproc=1, or, if each task sees one" in errors[0]
    assert "srun --gpu-bind=none" in errors[0]


def test_a_driver_that_never_answers_is_its_nodes(tmp_path):
    statuses, _, errors = run_in_job(tmp_path, "launch.device=auto", fault=A_DRIVER_THAT_HANGS)
    assert statuses[1] == HARDWARE and statuses[0] != 0
    assert "n1, local rank 0: the first use of its device has not ended in 1 s" in errors[1]
    assert hosts_of(read_outcomes(tmp_path)) == {"n1": HARDWARE}


def test_a_node_of_another_driver_is_left_out(tmp_path):
    statuses, outputs, errors = run_in_job(tmp_path, fault=ANOTHER_TORCH_ON_NODE_1)
    assert statuses == [0, 0], errors
    assert "n1 is left out: driver 6.1, but 6.0 on 1 of 2 nodes" in outputs[0]
