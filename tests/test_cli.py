"""The command line: what it prints, what it starts, and with which exit status it ends."""

import subprocess
import sys
import types
from pathlib import Path

import pytest
from waiting import LIMIT_S

from megatsp import __version__, cli, launcher
from megatsp.checkpoint.manifest import read_manifest
from megatsp.compose import group_choices, key_paths
from megatsp.schema import Config
from megatsp.validate import validate

ROOT = Path(__file__).resolve().parents[1]
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_ID", "SLURM_NTASKS", launcher.LAUNCHER_PID)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No launcher's variable is set."""
    for name in RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def calls(monkeypatch):
    """What the command asked of training and of the launcher, which are replaced by recorders."""
    seen: list[tuple] = []

    def recorder(name, result):
        return lambda *arguments: seen.append((name, *arguments)) or result

    for module, function, result in (
        ("run", "train", 0),
        ("report", "describe", "the mesh"),
        ("generate", "main", None),
    ):
        fake = types.ModuleType(f"megatsp.training.{module}")
        setattr(fake, function, recorder(module, result))
        monkeypatch.setitem(sys.modules, fake.__name__, fake)
    monkeypatch.setattr(launcher, "launch_local", recorder("launch", 0))
    return seen


@pytest.fixture
def as_rank(monkeypatch):
    """Runs the command as a rank of a world and returns the status that its process ends with."""

    def exit_instead(work):
        raise SystemExit(work())  # run_rank never returns; the process of the tests must live on

    def run(rank: int, world_size: int, arguments: list[str]) -> int:
        monkeypatch.setattr(launcher, "run_rank", exit_instead)
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        return ended.value.code

    return run


def test_help_names_every_key_and_choice_in_100_columns(capsys):
    assert cli.main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    groups = {path.rpartition(".")[0] for path in key_paths()}
    for path in key_paths():
        assert path in groups or f"  {path}: " in text
    for group, choices in group_choices().items():
        assert f"  {group}" in text and all(choice in text for choice in choices)
    assert "trainer.seq_length: int = 256 [tokens]" in text
    assert "(fp32 | bf16)" in text and "(in [0, 1))" in text and "(>= 1)" in text
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("command", ["train", "bench"])
def test_help_does_not_import_torch(command):
    help = f"try: c.main(['{command}', '--help'])\nexcept SystemExit: pass\n"
    code = f"import sys, megatsp.cli as c\n{help}sys.exit('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=LIMIT_S)
    assert result.returncode == 0 and f"usage: megatsp {command}" in result.stdout.decode()


def test_a_reader_that_has_seen_enough_is_no_error():
    line = f"{sys.executable} -m megatsp train --help | head -n 1; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S)
    assert result.stdout.splitlines()[0].startswith("usage: megatsp train")
    assert result.stdout.splitlines()[1] in ("141", "0") and result.stderr == ""


def test_the_module_is_the_command():
    result = subprocess.run(
        [sys.executable, "-m", "megatsp", "trian"], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S
    )
    assert result.returncode == 2
    assert result.stderr == (
        "megatsp: error: unknown command trian; did you mean train? "
        "(commands: train, sft, generate, bench, preprocess, data, convert, ckpt, report, doctor, "
        "preflight, launch)\n"
    )


@pytest.mark.parametrize(
    ("arguments", "text"),
    [([], "usage: megatsp COMMAND"), (["-h"], "usage: megatsp COMMAND"), (["--version"], __version__)],
)
def test_usage_and_version(capsys, arguments, text):
    assert cli.main(arguments) == 0
    assert text in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--dryrun"], "unrecognized arguments: --dryrun"),
        (["train", "--dry"], "unrecognized arguments: --dry"),
        (["train", "trainer.trian_iters=5"], "did you mean trainer.train_iters?"),
        (["train", "trainer.seq_length=255"], "use 254 or 256"),
        (["train", "--config-dir", "nowhere"], "--config-dir nowhere"),
        (["generate"], "the following arguments are required: RUN_FOLDER"),
        (["generate", "nowhere"], "no run folder nowhere"),
        (["generate", ".", "--tokens", "0"], "--tokens 0: must be at least 1"),
        (["generate", ".", "--tokens", "x"], "invalid int value: 'x'"),
        (["generate", ".", "--temperature", "nan"], "--temperature nan: must be in [0, inf)"),
    ],
)
def test_a_mistake_is_one_message_and_status_2(capsys, calls, arguments, message):
    assert cli.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("megatsp: error: ") and message in printed.err
    assert printed.out == "" and calls == []


def test_an_error_that_is_not_the_users_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(cli, "_dispatch", lambda arguments: int("x"))  # not raised in megatsp's code
    with pytest.raises(ValueError, match="invalid literal"):
        cli.main(["train"])


def test_alone_it_starts_the_ranks(calls):
    arguments = ["train", "parallel.tsp=2", "--config-dir", str(ROOT / "configs"), "launch.nproc=2"]
    assert cli.main(arguments) == 2  # every name in configs/ exists in megatsp too
    arguments = ["train", "parallel.tsp=2", "launch.nproc=2"]
    assert cli.main(arguments) == 0
    ((name, nproc, command, restarts),) = calls
    assert (name, nproc, command) == ("launch", 2, [sys.executable, "-m", "megatsp", *arguments])
    assert (restarts.limit, restarts.backoff_s, restarts.newest()) == (3, 5.0, -1)


def test_the_launcher_knows_the_newest_checkpoint(calls, tmp_path):
    assert cli.main(["train", f"output_dir={tmp_path}", "name=a", "launch.max_restarts=7"]) == 0
    restarts = calls[0][3]
    (tmp_path / "a" / "checkpoints").mkdir(parents=True)
    pointer = tmp_path / "a" / "checkpoints" / "latest_checkpointed_iteration.txt"
    for text, iteration in (("12\n", 12), ("what", -1)):
        pointer.write_text(text)
        assert (restarts.limit, restarts.newest()) == (7, iteration)


def test_the_status_of_the_ranks_is_that_of_the_command(monkeypatch):
    monkeypatch.setattr(launcher, "launch_local", lambda nproc, command, restarts: 137)
    assert cli.main(["train"]) == 137


def test_as_a_rank_it_trains_with_the_worlds_size(calls, as_rank):
    assert as_rank(3, 4, ["train", "parallel.tsp=2", "trainer.global_batch_size=8"]) == 0
    ((name, config, _),) = calls
    assert name == "run" and (config.parallel.tsp, config.parallel.dp_shard) == (2, 2)


def test_as_a_rank_it_does_not_benchmark(monkeypatch, capsys):
    monkeypatch.setattr(launcher, "run_rank", lambda work: work())
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["bench"]) == 2
    assert (
        "megatsp bench starts ranks of its own: start it without torchrun or srun" in capsys.readouterr().err
    )


def test_dry_run_prints_and_starts_nothing(calls, capsys):
    assert cli.main(["train", "--dry-run", "launch.nproc=2", "parallel.tsp=2"]) == 0
    text = capsys.readouterr().out
    assert "  dp_shard: 1\n" in text and text.endswith("the mesh\n")
    ((name, config, world_size),) = calls
    assert (name, world_size) == ("report", 2) and config == validate(config, 2)


def test_dry_run_under_a_launcher_prints_once(calls, capsys, as_rank):
    for rank in range(2):
        assert as_rank(rank, 2, ["train", "--dry-run", "parallel.tsp=2"]) == 0
    assert len(calls) == 1 and capsys.readouterr().out.count("the mesh") == 1


def test_generate_starts_ranks_and_then_generates(calls, tmp_path, as_rank):
    arguments = ["generate", str(tmp_path), "--prompt", "def ", "--nproc", "2", "--temperature", "0"]
    assert cli.main(arguments) == 0
    assert calls == [("launch", 2, [sys.executable, "-m", "megatsp", *arguments], None)]
    calls.clear()
    assert as_rank(0, 2, arguments) == 0
    assert calls == [("generate", tmp_path, "last", "", "def ", 200, 0.0, 1234)]


SRUN = {
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
}


def test_a_task_of_srun_is_a_rank():
    environment = dict(SRUN)
    assert cli._join(environment)
    assert environment == {**SRUN, "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}


def test_one_task_or_a_batch_script_is_no_rank():
    assert not cli._join({})
    assert not cli._join({**SRUN, "SLURM_NTASKS": "1"})
    assert not cli._join({name: value for name, value in SRUN.items() if name != "SLURM_STEP_ID"})
    one = SRUN | {"SLURM_NTASKS": "1"}
    assert not cli._join(dict(one))  # such as an interactive shell
    assert cli._join(one | {"MEGATSP_NPROC": "1"})  # of a job of `megatsp launch`


@pytest.mark.parametrize("name", ["MASTER_ADDR", "MASTER_PORT"])
def test_srun_needs_the_meeting_point(name):
    with pytest.raises(ValueError, match=f"{name} is not set; export MASTER_ADDR="):
        cli._join({key: value for key, value in SRUN.items() if key != name})


def test_a_rank_without_a_world():
    with pytest.raises(ValueError, match="WORLD_SIZE is not"):
        cli._join({"RANK": "0"})


def test_only_our_own_value_errors_are_the_users():
    def caught(function) -> BaseException:
        try:
            function()
        except Exception as error:
            return error
        raise AssertionError("nothing was raised")

    assert launcher.is_users(caught(lambda: validate(Config(name="a/b"), 1)))
    assert launcher.is_users(caught(lambda: read_manifest(Path("nowhere"))))  # Damaged, our own kind of one
    assert not launcher.is_users(caught(lambda: int("x")))
    assert not launcher.is_users(caught(lambda: validate(None, 1)))
