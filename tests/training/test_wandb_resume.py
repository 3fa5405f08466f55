"""One W&B run over requeues: what its files hold together is metrics.jsonl, each step once and in order."""

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch.distributed as dist
from distributed import run_distributed
from runs import StopIf, command, overrides, start_training, write_corpus
from waiting import LIMIT_S, wait_until
from wandb_files import all_rows, date_back, parsed

from megatsp.compose import compose
from megatsp.schema import Config, LoggingConfig
from megatsp.training.logs import Reporter, read_metrics
from megatsp.training.wandb_file import last_step
from megatsp.training.wandb_run import stored_id

STEPS = 16
BLOCK = 32768  # bytes
KEY = "local-" + "0123456789abcdef" * 3  # of nobody
NAMES = {
    "iteration", "consumed-tokens", "lm loss", "grad-norm", "learning-rate", "iteration-time-ms",
    "tokens/s/gpu", "tflops/gpu", "memory/peak-gib", "comm/exposed-ms", "comm/bytes",
}  # fmt: skip


def start(config: Config, end: str, at: int) -> None:
    """On a rank: trains until it is asked to stop, or is killed, after so many iterations."""
    training = start_training(config)

    def is_time() -> bool:
        if training.state.iteration < at:
            return False
        if end == "kill":
            dist.barrier()  # so that the other rank has done what it does before it is killed
            os.kill(os.getpid(), signal.SIGKILL)
        return end == "stop"

    training.run(StopIf(is_time))
    training.gpt.engine.close()


def starts(config: Config, ends: Sequence[tuple[str, int]], first: int = 0) -> None:
    """Starts a run on two ranks again and again. first: how many starts it has had."""
    for number, (end, at) in enumerate(ends, start=1):
        if end == "kill":
            with pytest.raises(AssertionError, match="exit code -9"):
                run_distributed(start, 2, config, end, at)
        else:
            run_distributed(start, 2, config, end, at)
        date_back(Path(config.output_dir) / config.name, first + number)


def holders(folder: Path) -> list[Path]:
    """The files below a folder that the key is in."""
    return [path for path in folder.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


def configured(folder: Path, *more: str) -> Config:
    write_corpus(folder / "corpus")
    given = overrides(
        folder / "corpus", folder, f"trainer.train_iters={STEPS}", "trainer.eval_interval=2",
        "checkpoint.save_interval=4", "checkpoint.async_save=false", "parallel.tsp=2",
        "logging.wandb=offline", "logging.sample_interval=8", "logging.sample_tokens=4", *more,
    )  # fmt: skip
    return compose(given)


def test_two_stops_and_a_kill_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    config = configured(tmp_path)
    # Stops where an evaluation is due, which the next start makes; and is killed far from a checkpoint.
    starts(config, [("stop", 4), ("kill", 7), ("stop", 11), ("end", 0)])
    run = tmp_path / "run"
    found = all_rows(run)
    assert [step for step, _ in found] == list(range(1, STEPS + 1))
    expected: dict[int, dict] = {}
    for entry in read_metrics(run / "metrics.jsonl"):
        kept = {name: value for name, value in entry.items() if value is not None}
        expected.setdefault(entry["iteration"], {}).update(kept)
    for step, row in found:
        samples = {name: row.pop(name) for name in list(row) if name.startswith("samples/")}
        assert row == expected[step]
        assert bool(samples) == (step % 8 == 0) and row.keys() >= NAMES
        assert ("val/lm loss" in row and "val/bits-per-byte" in row) == (step % 2 == 0)
    files = sorted((run / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 4 and len({file.name for file in files}) == 1
    assert stored_id(run) and files[0].name == f"run-{stored_id(run)}.wandb"
    (begun,) = [record.run for record in parsed(files[-1]) if record.WhichOneof("record_type") == "run"]
    settings = {update.key: json.loads(update.value_json) for update in begun.config.update}
    assert begun.resume and settings["slurm"]["job_id"] == "4711"
    assert settings["mesh"]["axes"]["tsp"] == 2 and settings["mesh"]["world_size"] == 2
    assert settings["code_version"]["megatsp"]
    assert holders(run) == []
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    kinds = [event["kind"] for event in events if event["kind"] != "saved"]
    stop = "to be requeued"
    assert kinds == ["started", stop, "resumed", "resumed", stop, "resumed", "finished"]
    assert "2 ranks on 1 node, rank 0 on " in events[0]["text"]
    assert "Slurm job 4711, restart 0" in events[0]["text"]
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [(sample["iteration"], sample["prompt"]) for sample in samples] == [(8, "The "), (16, "The ")]


def test_killed_before_its_first_checkpoint_a_run_keeps_its_id(tmp_path):
    config = configured(tmp_path)
    starts(config, [("kill", 3)])
    begun = stored_id(tmp_path / "run")
    starts(config, [("end", 0)], first=1)
    assert stored_id(tmp_path / "run") == begun != ""
    assert [step for step, _ in all_rows(tmp_path / "run")] == list(range(1, STEPS + 1))


def test_with_other_settings_it_is_another_run(tmp_path):
    starts(configured(tmp_path), [("kill", 3)])
    begun = stored_id(tmp_path / "run")
    starts(configured(tmp_path, "optimizer.lr=0.02"), [("end", 0)], first=1)
    assert stored_id(tmp_path / "run") != begun


def log_until_killed(folder: Path, rows: int) -> None:
    """A start whose machine is lost, W&B's service with it."""
    from wandb.sdk import wandb_setup

    reporter = Reporter(Config(logging=LoggingConfig(wandb="offline")), folder, 0, "abc", active=True)
    reporter.begin_wandb()
    for iteration in range(1, rows + 1):
        reporter.log(iteration, {"lm loss": 1.0, **{f"metric {n}": "x" * 100 for n in range(20)}})
    (file,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    wait_until(lambda: file.stat().st_size >= 4 * BLOCK, "W&B's service has written some blocks")
    connection = wandb_setup.singleton()._connection
    assert connection is not None and connection._proc is not None
    connection._proc._process.kill()
    connection._proc._process.wait()
    os.kill(os.getpid(), signal.SIGKILL)


def test_where_w_and_b_is_ahead_of_the_checkpoint_its_first_values_stay(tmp_path):
    with pytest.raises(AssertionError, match="exit code -9"):
        run_distributed(log_until_killed, 1, tmp_path, 100)
    (file,) = date_back(tmp_path, 1).glob("*.wandb")
    ahead, size = last_step(file), file.stat().st_size
    assert 20 < ahead < 100 and size >= 4 * BLOCK and size % BLOCK == 0  # W&B writes whole blocks
    reporter = Reporter(Config(logging=LoggingConfig(wandb="offline")), tmp_path, 20, "abc", active=True)
    reporter.begin_wandb()
    for iteration in range(21, 121):
        reporter.log(iteration, {"lm loss": 2.0})
    reporter.close()
    found = [(step, row["lm loss"]) for step, row in all_rows(tmp_path)]
    assert found == [(step, 1.0 if step <= ahead else 2.0) for step in range(1, 121)]
    values = [entry["lm loss"] for entry in read_metrics(tmp_path / "metrics.jsonl")]
    assert values == [1.0] * 20 + [2.0] * 100


@pytest.mark.parametrize("more", [["--dry-run"], ["trainer.train_iters=3"], ["trainer.lr=1"]])
def test_a_key_is_in_no_output_and_in_no_file(tmp_path, monkeypatch, more):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    write_corpus(tmp_path / "corpus")
    job = command("train", *overrides(tmp_path / "corpus", tmp_path, *more, "logging.wandb=offline"))
    out, err = job.communicate(timeout=LIMIT_S)
    assert job.returncode == (2 if more == ["trainer.lr=1"] else 0), err
    assert KEY not in out + err and holders(tmp_path) == []
    assert (tmp_path / "run" / "wandb").is_dir() == (more == ["trainer.train_iters=3"])
