"""What is refused before a job is submitted, and what is said once it is."""

import os
import re
import stat
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from runs import ROOT, overrides
from waiting import LIMIT_S

from megatsp import cli
from megatsp.jobs.command import USAGE
from megatsp.jobs.submit import array_tasks, check_folder, plan

JOB = ("launch.nodes=2", "launch.nproc=2", "parallel.tsp=2", "launch.device=cpu")


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    return overrides(tmp_path / "corpus", tmp_path / "runs", *JOB)


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A stand-in for sbatch on the PATH, which runs these lines of shell."""

    def install(*lines: str) -> Path:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        file = folder / "sbatch"
        file.write_text("\n".join(["#!/bin/sh", *lines]))
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        return folder

    return install


def launch(*arguments: str) -> int:
    return cli.main(["launch", "slurm", *arguments])


@pytest.mark.parametrize(
    ("array", "tasks"),
    [("0-3", "0 1 2 3"), ("1,5,9%2", "1 5 9"), ("0-8:4", "0 4 8"), ("3", "3"), ("1,1-2", "1 2")],
)
def test_tasks_of_an_array(array: str, tasks: str) -> None:
    assert array_tasks(array) == tasks.split()


@pytest.mark.parametrize("array", ["0-99999999", "0-1000", "0-999,2000", f"0-{10**30}:7"])
def test_more_tasks_than_slurm_takes_are_refused_at_once(array: str) -> None:
    with pytest.raises(ValueError, match=r"--array .*: [\d,]+ tasks, and at most 1,000 "):
        array_tasks(array)
    assert len(array_tasks("0-99900:100")) == 1000


@pytest.mark.parametrize("array", ["", "a", "3-1", "1-4:0", "1,,2", "0-3%", "-1"])
def test_an_unreadable_array_is_refused(array: str) -> None:
    with pytest.raises(ValueError, match="give numbers as sbatch takes them"):
        array_tasks(array)


def test_a_submitted_job_leaves_its_script_and_says_where_to_look(arguments, sbatch, tmp_path, capsys):
    folder = sbatch(f'cp "$2" {tmp_path}/given.sh', "echo '4711;cluster'")
    assert launch(*arguments) == 0
    said = capsys.readouterr().out
    run = tmp_path / "runs" / "run"
    assert "submitted job 4711: train on 2 nodes x 2 ranks" in said
    assert f"megatsp launch status {run}" in said
    given = (tmp_path / "given.sh").read_text()
    assert (run / "slurm" / "job_4711.sh").read_text() == given
    assert [path.name for path in (run / "slurm").iterdir()] == ["job_4711.sh"]
    capsys.readouterr()
    assert launch("--dry-run", *arguments) == 0
    assert capsys.readouterr().out == given
    assert folder.is_dir()


def test_the_command_that_comes_next_can_be_pasted(arguments, sbatch, tmp_path, capsys):
    sbatch("echo 12")
    assert launch(*arguments, f"output_dir='{tmp_path}/my runs'") == 0
    assert capsys.readouterr().out.endswith(f"\nmegatsp launch status '{tmp_path}/my runs/run'\n")


def test_each_task_of_an_array_has_a_folder_of_its_own(arguments, sbatch, tmp_path, capsys):
    sbatch("echo 12")
    assert launch("--array", "1-2", *arguments, "name=seed%a", "trainer.seed=%a") == 0
    for task in "12":
        assert (tmp_path / "runs" / f"seed{task}" / "slurm" / f"job_12_{task}.sh").is_file()
    assert "2 tasks" in capsys.readouterr().out


def test_data_that_is_not_seen_is_warned_of(arguments, sbatch, capsys, tmp_path):
    sbatch("echo 12")
    assert launch(*arguments, f"data.path={tmp_path}/missing") == 0
    assert f"warning: data.path: {tmp_path}/missing is not there" in capsys.readouterr().out


def test_options_that_contradict_nothing_pass(arguments):
    options = ["--mail-type=END", "--gres=nvme:1", "--comment 'a b'", "-w n1", "--time-min=10", "-v"]
    planned = plan("train", [*arguments, f"launch.slurm.options={options}"], "", "")
    assert planned.job.config.launch.slurm.options == options
    own = ["--gres=gpu:mi300x:2", "--mem=10G"]
    free = ["launch.device=auto", "launch.slurm.gpu_request=none", "launch.slurm.exclusive=false"]
    planned = plan("train", [*arguments, *free, f"launch.slurm.options={own}"], "", "")
    assert planned.job.config.launch.slurm.options == own


def test_what_is_no_secret_passes(arguments, monkeypatch):
    monkeypatch.setenv("GIT_AUTHOR_NAME", "a-long-name")
    setup = ["export TOKENIZERS_PARALLELISM=false", 'export HF_TOKEN="$(cat ~/.hf)"', "export KEY=$OTHER"]
    named = ["logging.wandb_project=a-long-name", f"launch.slurm.setup={setup}"]
    assert plan("train", [*arguments, *named], "", "").job.config.launch.slurm.setup == setup


def test_variables_that_would_override_the_script_are_left_out(
    arguments, sbatch, monkeypatch, tmp_path, capsys
):
    for name in ("PARTITION", "ACCOUNT", "TIMELIMIT", "EXPORT", "GRES", "NO_REQUEUE", "ERROR", "WAIT"):
        monkeypatch.setenv(f"SBATCH_{name}", "NONE")
    sbatch(f"env | grep ^SBATCH_ | sort >{tmp_path}/seen", "echo 12")
    assert launch(*arguments, "launch.slurm.partition=gpu", "launch.slurm.time=1:00:00") == 0
    left_out = "SBATCH_ERROR, SBATCH_EXPORT, SBATCH_NO_REQUEUE, SBATCH_PARTITION, SBATCH_TIMELIMIT"
    assert f"left out, for the job's script says it: {left_out}\n" in capsys.readouterr().out
    assert (tmp_path / "seen").read_text() == "SBATCH_ACCOUNT=NONE\nSBATCH_GRES=NONE\nSBATCH_WAIT=NONE\n"


def test_a_job_that_submits_another_one_gives_it_none_of_its_own_variables(
    arguments, sbatch, monkeypatch, tmp_path
):
    for name in ("ARRAY_JOB_ID", "ARRAY_TASK_ID", "RESTART_COUNT", "JOB_ID", "CPUS_PER_TASK"):
        monkeypatch.setenv(f"SLURM_{name}", "30")
    monkeypatch.setenv("SLURM_CONF", "/etc/ours.conf")
    sbatch(f"env | grep ^SLURM_ >{tmp_path}/seen", "echo 12")
    assert launch(*arguments) == 0
    assert (tmp_path / "seen").read_text() == "SLURM_CONF=/etc/ours.conf\n"


def test_a_submitted_job_is_named_though_its_script_cannot_be_kept(arguments, sbatch, tmp_path, capsys):
    sbatch(f"mkdir {tmp_path}/runs/run/slurm/job_12.sh", "echo 12")
    (tmp_path / "runs" / "run" / "slurm").mkdir(parents=True)
    assert launch(*arguments) == 0
    said = capsys.readouterr().out
    assert said.startswith("submitted job 12: ") and "job_12.sh cannot be written: " in said


def test_slurms_refusal_is_shown_whole(arguments, sbatch, tmp_path, capsys):
    sbatch(
        "echo 'sbatch: error: invalid partition specified: nope' >&2",
        "echo 'sbatch: error: second' >&2",
        "exit 1",
    )
    assert launch(*arguments, "launch.slurm.partition=nope") == 2
    said = capsys.readouterr().err
    assert "sbatch: error: invalid partition specified: nope\nsbatch: error: second" in said
    assert not (tmp_path / "runs").exists()


def test_of_a_refused_job_no_new_folder_is_left_and_no_old_one_is_lost(arguments, sbatch, tmp_path):
    sbatch("exit 1")
    (tmp_path / "runs" / "a1").mkdir(parents=True)
    (tmp_path / "runs" / "a2" / "slurm").mkdir(parents=True)
    assert launch(*arguments, "--array", "1-3", "name=a%a") == 2
    assert {str(path.relative_to(tmp_path / "runs")) for path in (tmp_path / "runs").rglob("*")} == {
        "a1", "a2", "a2/slurm",
    }  # fmt: skip


def test_without_sbatch_it_says_what_else_there_is(arguments, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert launch(*arguments) == 2
    assert "sbatch is not on the PATH" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["launch.nproc=3"], "3"),
        (["parallel.tsp=4"], "do not divide the 2 of one (launch.nproc)"),
        (["launch.profile=mi300"], "mi300x_roce"),
        (["launch.slurm.tasks=core"], "choose one of node, gpu"),
        (["launch.slurm.partitoin=a"], "launch.slurm.partition"),
        (["launch.slurm.time=tomorrow"], "hours:minutes:seconds"),
        (["launch.slurm.account='a b'"], "one word"),
        (["launch.slurm.port=80"], "at least 1024"),
        (["launch.slurm.options=['mail']"], "no option of sbatch"),
        (["launch.slurm.container='apptainer \"exec'"], "no closing quotation"),
        (["launch.slurm.setup=['export WANDB_API_KEY=abcdef']"], "WANDB_API_KEY"),
        (["launch.slurm.container='env HF_TOKEN=abc x'"], "HF_TOKEN"),
        (["launch.slurm.setup=['wandb login abc123']"], "a key"),
        (["launch.slurm.options=['--comment=hf_abcdefghijklmnopqrstuvwxyz']"], "a key"),
        (["launch.slurm.options=['--output=x']"], "leave it out"),
        (["launch.slurm.options=['--time=1']"], "use launch.slurm.time"),
        (["launch.slurm.options=['-N4']"], "use launch.nodes"),
        (["launch.slurm.options=['-N 4']"], "use launch.nodes"),
        (["launch.slurm.options=['-p gpu']"], "use launch.slurm.partition"),
        (["launch.slurm.options=['--mail-type=END -t 1']"], "use launch.slurm.time"),
        (["launch.slurm.options=['--part=gpu']"], "use launch.slurm.partition"),
        (["launch.slurm.options=['--qos=x']"], "use launch.slurm.qos"),
        (["launch.slurm.options=['-G 4']"], "use launch.nproc"),
        (["launch.slurm.options=['--gres gpu:4']", "launch.device=auto"], "use launch.nproc, or"),
        (["launch.slurm.options=['--mem=10G']"], "use launch.slurm.exclusive=false and this"),
        (["launch.slurm.options=['--export=NONE']"], "leave it out"),
        (["launch.slurm.time=0:04:00"], "launch.slurm.signal_s=300"),
        (["--array", "0-1%0", "name=a%a"], "as sbatch takes them"),
        (["name=a%a"], "give --array"),
        (["--array", "0-1"], "would share a folder"),
        (["--array", "3"], "would share a folder"),
        (["--array", "0-1", "name=a%a", "name=b"], "would share a folder"),
        (["parallel.tsp=-1"], "parallel.tsp=-1 took the 4 ranks that the other axes leave"),
        (["--array", "1-2", "name=a%a", "launch.nproc=%a"], "cannot change launch"),
        (["--array", "one"], "as sbatch takes them"),
        (["--after", "yesterday"], "numbers of jobs"),
        (["--dryrun"], "megatsp launch slurm --help"),
    ],
)
def test_what_cannot_be_run_is_refused_before_it_is_submitted(
    arguments, sbatch, tmp_path, more, message, capsys
):
    sbatch(f"touch {tmp_path}/submitted", "echo 1")
    assert launch(*arguments, *more) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "submitted").exists() and not (tmp_path / "runs").exists()


def test_the_value_of_a_secret_is_refused_and_not_shown(arguments, sbatch, monkeypatch, capsys):
    monkeypatch.setenv("MY_TOKEN", "s3cr3t-s3cr3t")
    sbatch("echo 1")
    assert launch(*arguments, "logging.wandb_project=s3cr3t-s3cr3t") == 2
    said = capsys.readouterr()
    assert "MY_TOKEN" in said.err and "s3cr3t" not in said.err + said.out


@pytest.mark.parametrize("secret", ["s3cr3t-s3cr3t", "s3cr3t'$s3cr3t\"`}"])
@pytest.mark.parametrize("place", ["interpolation", "file", "profile", "folder"])
def test_a_secret_is_found_where_no_argument_holds_it(
    arguments, monkeypatch, tmp_path, capsys, secret, place
):
    monkeypatch.setenv("MY_TOKEN", secret)
    (tmp_path / "experiment").mkdir()
    mine = {"logging": {"wandb_project": "${oc.env:MY_TOKEN}"}}
    (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{yaml.safe_dump(mine)}")
    variables = {"HARMLESS": {"value": secret, "why": "none"}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"about": "mine", "variables": variables}))
    folder = tmp_path / "s3cr3t-s3cr3t"
    folder.mkdir()
    if place == "folder":
        monkeypatch.setenv("MY_TOKEN", folder.name)
        monkeypatch.chdir(folder)
    more = {
        "interpolation": ["logging.wandb_project='${oc.env:MY_TOKEN}'"],
        "file": ["--config-dir", str(tmp_path), "experiment=mine"],
        "profile": [f"launch.profile={tmp_path}/own.yaml"],
        "folder": [],
    }[place]
    assert launch("--dry-run", *arguments, *more) == 2
    said = capsys.readouterr()
    assert "the value of MY_TOKEN would be written" in said.err and "s3cr3t" not in said.err + said.out


@pytest.mark.parametrize(
    "more",
    [
        "launch.slurm.options=['--export=HF_TOKEN=hf_s3cr3t']",
        "launch.slurm.options=['HF_TOKEN=hf_s3cr3t']",
        "launch.slurm.options=['--output=s3cr3t-s3cr3t']",
        "launch.slurm.options=['--output=hf_s3cr3ts3cr3ts3cr3ts3cr3t']",
        "launch.slurm.container='env \"HF_TOKEN=s3cr3t'",
        "launch.slurm.partition='a ${oc.env:MY_TOKEN}'",
        "launch.slurm.time='${oc.env:MY_TOKEN}'",
    ],
)
def test_a_refusal_does_not_show_a_secret(arguments, monkeypatch, capsys, more):
    monkeypatch.setenv("MY_TOKEN", "s3cr3t-s3cr3t")
    assert launch("--dry-run", *arguments, more) == 2
    said = capsys.readouterr()
    assert "launch.slurm." in said.err and "s3cr3t" not in said.err + said.out


def test_a_run_that_is_kept_offline_for_want_of_a_key_is_said_at_submission(
    arguments, sbatch, monkeypatch, tmp_path, capsys
):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    sbatch("echo 12")
    assert launch(*arguments, "logging.wandb=auto") == 0
    assert "so the run is kept offline; to have it online, `wandb login`" in capsys.readouterr().out
    assert launch(*arguments, "logging.wandb=offline", "name=other") == 0
    assert "Weights & Biases" not in capsys.readouterr().out


def test_a_dead_wandb_key_is_found_at_submission(arguments, sbatch, tmp_path, monkeypatch, capsys):
    class Refuses(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_error(401)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    key = "0123456789abcdef" * 2 + "01234567"
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    sbatch(f"touch {tmp_path}/submitted", "echo 1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Refuses) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
            assert launch(*arguments, "logging.wandb=online") == 2
        finally:
            server.shutdown()
            thread.join()
    said = capsys.readouterr().err
    assert "WANDB_API_KEY" in said and key not in said
    assert not (tmp_path / "submitted").exists() and not (tmp_path / "runs").exists()


def test_a_dependency_is_sbatchs_own(arguments):
    def after(text: str) -> str:
        return plan("train", arguments, "", text).job.after

    assert [after("12"), after("12_0,13"), after("afterok:9"), after("singleton")] == [
        "afterany:12", "afterany:12_0:13", "afterok:9", "singleton",
    ]  # fmt: skip


def test_a_folder_that_other_nodes_do_not_see_is_refused(monkeypatch):
    monkeypatch.setattr("megatsp.jobs.submit._file_system", lambda folder: "tmpfs")
    folder = Path(os.environ.get("TMPDIR", "/tmp")) / f"megatsp-test-{os.getpid()}"
    try:
        check_folder(folder, nodes=1)
        with pytest.raises(ValueError, match="lies on tmpfs, which the other nodes do not see"):
            check_folder(folder, nodes=2)
    finally:
        (folder / "slurm").rmdir()
        folder.rmdir()


def test_a_folder_on_a_local_disk_is_warned_of(monkeypatch, tmp_path):
    monkeypatch.setattr("megatsp.jobs.submit._file_system", lambda folder: "ext4")
    assert check_folder(tmp_path / "run", nodes=1) == ""
    said = check_folder(tmp_path / "run", nodes=2)
    assert "lies on ext4" in said and f"srun ls -d {tmp_path}/run" in said
    assert f"srun ls -d '{tmp_path}/my run'" in check_folder(tmp_path / "my run", nodes=2)


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(ValueError, match="cannot write to .*/run/slurm: .*; choose another output_dir="):
        check_folder(tmp_path / "run", nodes=1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["slrum"], "did you mean slurm"),
        (["slurm", "tarin", "a=b"], "train"),
        (["slurm", "preflight", "launch.preflight=none", "launch.nproc=2"], "use full or quick"),
        (["torchrun", "launch.nodes=2", "parallel.tsp=1"], "--address is missing"),
        (["torchrun", "--node-rank", "3"], "--node-rank 3"),
        (["local", "preflight"], "megatsp preflight"),
    ],
)
def test_launch_names_what_it_cannot_do(given, message, capsys):
    assert cli.main(["launch", *given]) == 2
    assert message in capsys.readouterr().err


def test_examples_of_the_help_and_of_the_document_can_be_pasted(tmp_path):
    """They print what they would do, each by a shell that stops at the first that fails."""
    examples = USAGE.partition("examples:\n")[2].replace("\\\n", " ").splitlines()
    launches = [line if "--dry-run" in line else f"{line} --dry-run" for line in examples if "slurm" in line]
    blocks = re.findall(r"(?:^    .*\n)+", (ROOT / "docs" / "running-on-slurm.md").read_text(), re.MULTILINE)
    look, submit = (block for block in blocks if "run=(" in block or 'slurm train "${run[@]}"\n' in block)
    lines = [
        f'megatsp() {{ {sys.executable} -m megatsp "$@"; }}',
        *launches,
        look,
        f"{submit.rstrip()} --dry-run",
    ]
    result = subprocess.run(
        ["bash", "-ec", "\n".join(lines)],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, timeout=LIMIT_S,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("#!/bin/bash") == 4 and (tmp_path / "mesh.png").is_file()


def test_help_says_all_that_launch_slurm_takes(capsys, arguments, tmp_path):
    with pytest.raises(SystemExit):
        launch("--help")
    said = capsys.readouterr().out
    assert "[train | sft | preflight] [group=choice | key=value ...]" in said and "--config-dir" in said
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").touch()
    assert launch("--dry-run", "--config-dir", str(tmp_path), "train", *arguments) == 0
    assert f"--config-dir {tmp_path})\n" in capsys.readouterr().out


def test_torchrun_prints_the_command_of_a_node(arguments, capsys):
    where = ["--dry-run", "--node-rank", "1", "--address", "n0:29500"]
    assert cli.main(["launch", "torchrun", *where, "train", *arguments]) == 0
    said = capsys.readouterr().out
    assert (
        "--nnodes 2 --node-rank 1 --rdzv-backend static --rdzv-endpoint n0:29500 --nproc-per-node 2" in said
    )
    assert "-m megatsp train model.num_layers=2" in said
