"""The job script is a pure function of the configuration: its head against golden files, its body a file.

Golden files are written anew by `python tests/jobs/test_script.py`: read the difference.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from megatsp.compose import compose
from megatsp.jobs.script import Job, body, quoted, script
from megatsp.validate import validate

GOLDEN = Path(__file__).parent / "golden"
ROOT = Path(__file__).parents[2]

JOBS = {
    "two_nodes_cpu": (
        "train", ["launch.nodes=2", "launch.nproc=2", "launch.device=cpu", "parallel.tsp=2"], {}
    ),
    "pretrain_128_nodes": (
        "train",
        [
            "model=gpt_7b", "launch=gpu8", "parallel.tsp=8", "launch.nodes=128", "launch.spare_nodes=2",
            "launch.profile=mi300x_roce", "launch.slurm.partition=gpu", "launch.slurm.account=longcontext",
            "launch.slurm.constraint='mi300x&rail'", "launch.slurm.time=24:00:00", "launch.slurm.qos=high",
            "launch.slurm.exclude='n[3,7-9]'", "launch.slurm.options=['--mail-type=END']",
            "launch.slurm.setup=['module load rocm']", "trainer.global_batch_size=128",
            "trainer.micro_batch_size=1", "trainer.seq_length=131072",
        ],
        {},
    ),
    "one_task_a_gpu_in_a_container": (
        "train",
        [
            "launch=gpu8", "parallel.tsp=4", "launch.slurm.tasks=gpu", "launch.slurm.gpu_request=gres",
            "launch.slurm.cpus_per_rank=12", "launch.slurm.exclusive=false", "launch.preflight=none",
            "launch.slurm.container='apptainer exec --rocm /images/megatsp.sif'", "launch.slurm.port=29500",
        ],
        {},
    ),
    "array_after": (
        "train",
        ["name=seed%a", "trainer.seed=%a", "launch.nproc=2", "parallel.tsp=2", "launch.device=cpu"],
        {"array": "0-3%2", "after": "afterany:41:42"},
    ),
}  # fmt: skip


def make(name: str) -> Job:
    command, overrides, more = JOBS[name]
    config = compose([text.replace("%a", "0") for text in overrides])
    config = validate(config, config.launch.nodes * config.launch.nproc)
    run = f"/scratch/runs/{'seed%a' if more else config.name}"
    return Job(config, command, tuple(overrides), run, "/home/me/my project", "/venv/bin/python", **more)


def head(text: str) -> str:
    return text.removesuffix(body())


@pytest.mark.parametrize("name", JOBS)
def test_script_is_its_golden_head_and_the_body(name: str) -> None:
    text = script(make(name))
    assert text.endswith(body())
    assert head(text) == (GOLDEN / f"{name}.txt").read_text()
    assert body() == (ROOT / "launch" / "job.sh").read_text()


@pytest.mark.parametrize("name", JOBS)
def test_script_is_clean_bash(name: str, tmp_path: Path) -> None:
    file = tmp_path / "job.sh"
    file.write_text(script(make(name)))
    shellcheck = Path(sys.executable).with_name("shellcheck")  # the pinned one
    result = subprocess.run([shellcheck, file], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "")


def test_script_depends_on_nothing_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = script(make("pretrain_128_nodes"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    assert script(make("pretrain_128_nodes")) == before


@pytest.mark.parametrize(
    "text", ["a b", "'", '"', "$HOME", "`id`", "%a", "x%ay", "", "ü", "a=%a,%a", "\\", "!"]
)
def test_words_reach_the_command_as_they_are(text: str) -> None:
    line = f"SLURM_ARRAY_TASK_ID=7; printf %s {quoted(text)}"
    assert subprocess.check_output(["bash", "-c", line], text=True) == text.replace("%a", "7")


if __name__ == "__main__":
    for each in JOBS:
        (GOLDEN / f"{each}.txt").write_text(head(script(make(each))))
