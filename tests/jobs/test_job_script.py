"""The body of a job's script against stand-ins for Slurm's commands, which write down how they are called."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from runs import ROOT
from waiting import LIMIT_S

from megatsp.compose import compose
from megatsp.jobs.attempts import read_attempts
from megatsp.jobs.script import Job, script
from megatsp.validate import validate

FAKES = {
    # Rank 0 on n0 does nothing; elsewhere a roll call finds all that it is told of, and a training is done.
    "srun": r"""
echo "srun $*" >>"$FAKE/calls"
nodes=$(grep -o -e '--nodelist=[^ ]*' <<<"$*" | cut -d= -f2)
folder=$FAKE/run/slurm/job_$SLURM_JOB_ID/attempt_0
case $* in
*roll_call*)
    [[ $nodes != *n0* ]] || { echo "srun: error: n0: task 0: Exited with exit code 127" >&2; exit 127; }
    good=$(sed 's/[^,]*/{"node": "&", "reasons": []}/g' <<<"$nodes")
    enough=false
    if (($(tr , '\n' <<<"$nodes" | wc -l) >= 2)); then
        enough=true
        tr , '\n' <<<"$nodes" | head -n 2 >"$folder/nodes.txt"
    fi
    [[ ! -e $FAKE/killed ]] || { rm "$FAKE/killed" && kill -KILL $$; }
    echo "{\"enough\": $enough, \"nodes\": [$good]}" >"$folder/roll_call.json"
    [[ $enough == true ]] || exit 77
    ;;
*) touch "$folder/done" ;;
esac
""",
    "scontrol": r"""
echo "scontrol $*" >>"$FAKE/calls"
case $* in
"show job"*) echo "JobId=7 Restarts=${RESTARTS:-0} JobState=RUNNING Reason=None NodeList=$NODES " ;;
"show hostnames"*) tr , '\n' <<<"$3" ;;
"show node"*) [[ $3 == n2 ]] || echo "NodeName=$3 NodeAddr=127.0.0.1 NodeHostName=$3" ;;
esac
""",
    "sinfo": 'echo "sinfo $*" >>"$FAKE/calls"',
    "squeue": '[[ -e $FAKE/ended ]] || printf "7.batch\\n7.0\\n7.extern\\n"',
    "scancel": 'echo "scancel $*" >>"$FAKE/calls" && touch "$FAKE/ended"',
}


class Fake:
    """A machine with those commands, and a job of two nodes of two ranks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir()
        for name, text in FAKES.items():
            file = folder / "bin" / name
            file.write_text(f"#!/bin/bash\n{text}")
            file.chmod(0o755)
        (folder / "run" / "slurm").mkdir(parents=True)

    def run(self, *overrides: str, **variables: str) -> subprocess.CompletedProcess[str]:
        given = [
            "launch.nodes=2",
            "launch.nproc=2",
            "launch.device=cpu",
            "launch.preflight=quick",
            *overrides,
        ]
        config = validate(compose(given), 4)
        job = Job(config, "train", tuple(given), str(self.folder / "run"), str(ROOT), sys.executable)
        return self.bash("-c", script(job), **variables)

    def bash(self, *arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
        """Runs bash as Slurm runs the script of job 7."""
        own = {
            "FAKE": str(self.folder), "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n0,n1,n2", "SLURM_JOB_CPUS_PER_NODE": "16(x2),6",
            "NODES": "n0,n1,n2", "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        return subprocess.run(
            ["bash", *arguments],
            env=os.environ | own | variables, capture_output=True, text=True, timeout=LIMIT_S,
        )  # fmt: skip

    def calls(self, word: str) -> list[str]:
        return [line for line in (self.folder / "calls").read_text().splitlines() if word in line]


@pytest.fixture
def fake(tmp_path: Path) -> Fake:
    return Fake(tmp_path)


def test_a_node_that_cannot_call_the_roll_is_left_out_and_named(fake: Fake) -> None:
    result = fake.run()
    assert result.returncode == 0, result.stderr
    assert "no roll call from n0: once more without it" in result.stdout
    assert [line.partition("--nodelist=")[2].split()[0] for line in fake.calls("srun")] == [
        "n0,n1,n2", "n1,n2", "n1,n2",
    ]  # fmt: skip


def test_without_a_spare_node_the_job_stops_and_names_it(fake: Fake) -> None:
    result = fake.run(NODES="n0,n1")
    assert result.returncode == 77
    assert "the preflight refused n0" in result.stderr
    (only,) = read_attempts(fake.folder / "run" / "slurm" / "job_7")
    assert (only.action, only.away) == ("stop", ("n0",))


def test_nodes_are_those_that_the_job_has_by_now(fake: Fake) -> None:
    assert fake.run(NODES="n1,n2").returncode == 0  # Slurm has taken n0 away
    (only,) = read_attempts(fake.folder / "run" / "slurm" / "job_7")
    assert only.nodes == ("n1", "n2")
    assert "--all --Node --nodes=n0,n1,n2 --states=down,fail " in fake.calls("sinfo")[0]


def test_a_task_of_an_array_speaks_of_itself_alone(fake: Fake) -> None:
    assert fake.run(NODES="n1,n2", SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="3").returncode == 0
    assert {line.split()[3] for line in fake.calls("scontrol show job")} == {"7_3"}


def test_what_a_killed_srun_leaves_on_the_nodes_is_ended(fake: Fake) -> None:
    (fake.folder / "killed").touch()
    fake.run("launch.restart_backoff_s=0", NODES="n1,n2")
    assert fake.calls("scancel") == ["scancel 7.0"]


def test_an_arrays_variables_of_another_job_are_not_its_own(fake: Fake) -> None:
    given = dict(SLURM_JOB_ID="8", SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="3")
    assert fake.run(NODES="n1,n2", **given).returncode == 0
    first, *others = fake.calls("scontrol show job")
    assert first.split()[3] == "7_3" and {line.split()[3] for line in others} == {"8"}


@pytest.mark.parametrize("command", ["false", "false # why", "export A=1; (exit 3)"])
def test_a_setup_that_fails_ends_the_job_and_says_so(fake: Fake, command: str) -> None:
    result = fake.run(f"launch.slurm.setup=['true # well',{command!r}]")
    assert result.returncode == 1
    assert result.stdout == f"megatsp: launch.slurm.setup failed: {command}\n"


def test_what_slurm_has_requeued_itself_is_lost(fake: Fake) -> None:
    assert fake.run(NODES="n1,n2", RESTARTS="1").returncode == 0
    (only,) = read_attempts(fake.folder / "run" / "slurm" / "job_7")
    assert only.action == "lost"


@pytest.mark.parametrize(("variables", "cores"), [({}, (3, 6)), ({"SLURM_CPUS_PER_TASK": "5"}, (5, 10))])
def test_a_step_asks_for_no_more_cores_than_every_node_has(fake: Fake, variables: dict, cores: tuple) -> None:
    assert fake.run(NODES="n1,n2", **variables).returncode == 0
    for line, count in zip(fake.calls("srun"), cores, strict=True):  # of the roll call's tasks, of a node
        assert f"--cpus-per-task={count} " in line and "--distribution=block:block " in line


@pytest.mark.parametrize("key", ["launch.slurm.time=1:00:00", "launch.nodes=4", "++launch.slurm.qos=high"])
def test_plain_sbatch_refuses_what_its_lines_say(key: str) -> None:
    file = ROOT / "launch" / "pretrain.sbatch"
    result = subprocess.run(
        ["bash", file, "optimizer.lr=1e-4", key], capture_output=True, text=True, timeout=LIMIT_S
    )
    assert result.returncode == 2
    assert result.stderr.startswith(f"{key}: this job has its nodes and limits from #SBATCH lines")


def test_plain_sbatch_takes_an_array(fake: Fake) -> None:
    (fake.folder / "run3").symlink_to("run")  # where the stand-ins look
    given = [
        "model=gpt_tiny", "trainer=default", "parallel.tsp=1", "launch.device=cpu", "launch.preflight=quick",
        f"output_dir={fake.folder}",
    ]  # fmt: skip
    file = ROOT / "launch" / "pretrain.sbatch"
    variables = {
        "PYTHON": sys.executable, "NODES": "n1,n2", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "2(x2)",
        "SLURM_ARRAY_JOB_ID": "6", "SLURM_ARRAY_TASK_ID": "3",
    }  # fmt: skip
    result = fake.bash(file, *given, "name=run%a", "trainer.seed=%a", **variables)
    assert result.returncode == 0, result.stderr
    assert "name=run3 trainer.seed=3" in fake.calls("srun")[-1]
    result = fake.bash(file, *given, **variables)
    assert result.returncode == 2 and "would share a folder: give name=...%a" in result.stderr


def test_a_node_without_an_address_is_called_by_its_name(fake: Fake) -> None:
    assert fake.run("launch.nodes=1", "launch.spare_nodes=1", NODES="n2,n1").returncode != 2
    assert "--address n2:" in fake.calls("srun")[0]
