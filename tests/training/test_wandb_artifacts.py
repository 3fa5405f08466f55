"""What `megatsp sft` exports becomes artifacts of the run in W&B."""

import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import wandb
from waiting import LIMIT_S
from wandb_files import parsed

from megatsp.schema import Config, FinetuneConfig, LoggingConfig
from megatsp.training import give_back as module
from megatsp.training import wandb_run
from megatsp.training.give_back import RECORD, give_back
from megatsp.training.wandb_run import log_exports


@pytest.fixture
def config(tmp_path, monkeypatch) -> Config:
    """Of a tuning that is over, whose export is one small file; artifacts are copied below tmp_path."""

    def write(output: Path) -> None:
        output.mkdir(exist_ok=True)
        (output / "model.safetensors").write_text("weights")

    for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setattr(module, "_writers", lambda config, found: {"hf": write})
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "iter_0000002").mkdir(parents=True)
    (checkpoints / "iter_0000002" / "state.json").touch()
    (checkpoints / "latest_checkpointed_iteration.txt").write_text("2\n")
    (tmp_path / "run" / "wandb_run_id").write_text("abcd1234\n")
    logging = LoggingConfig(wandb="offline", wandb_artifacts=True)
    return replace(
        Config(), output_dir=str(tmp_path), logging=logging, finetune=FinetuneConfig(hf="x", export="last")
    )


def test_an_export_is_kept_with_the_offline_run(config, tmp_path, capsys):
    run = tmp_path / "run"
    give_back(config, again=True)
    assert " artifacts:  run-hf, kept with the offline run, for `wandb sync`\n" in capsys.readouterr().out
    (file,) = (run / "wandb").glob("offline-run-*/run-abcd1234.wandb")
    requests = [r.request.log_artifact for r in parsed(file) if r.request.HasField("log_artifact")]
    artifacts = [r.artifact for r in parsed(file) if r.WhichOneof("record_type") == "artifact"]
    (artifact,) = artifacts or [request.artifact for request in requests]
    assert (artifact.name, artifact.type) == ("run-hf", "model")
    assert [entry.path for entry in artifact.manifest.contents] == ["model.safetensors"]
    assert json.loads((run / RECORD).read_text())["wandb"]
    give_back(config, again=False)
    assert "already, from iter_0000002" in capsys.readouterr().out
    assert len([*(run / "wandb").glob("offline-run-*")]) == 1


def test_without_a_wandb_run_there_is_none(config, tmp_path, capsys):
    disabled = replace(config, logging=replace(config.logging, wandb="disabled"))
    said, is_given = log_exports(disabled, tmp_path / "run", [])
    assert said.startswith("artifacts:  none") and not is_given
    (tmp_path / "run" / "wandb_run_id").unlink()
    said, is_given = log_exports(config, tmp_path / "run", [])
    assert said.startswith("artifacts:  none") and not is_given
    assert not (tmp_path / "run" / "wandb").exists()


def test_what_w_and_b_did_not_get_is_left_to_the_next_start(config, tmp_path, monkeypatch, capsys):
    def no(*given: object, **options: object) -> None:
        raise wandb.Error("the service did not write its port")

    record, changed = tmp_path / "run" / RECORD, tmp_path / "run" / "hf" / "model.safetensors"
    with monkeypatch.context() as context:
        context.setattr(wandb, "init", no)
        give_back(config, again=True)
    assert "artifacts:  W&B did not get run-hf (it did not start: the service" in capsys.readouterr().out
    assert json.loads(record.read_text())["wandb"] is False
    exported = changed.stat().st_mtime_ns
    give_back(config, again=False)
    out = capsys.readouterr().out
    assert "already, from iter_0000002" in out and "run-hf, kept with the offline run" in out
    assert json.loads(record.read_text())["wandb"] is True and changed.stat().st_mtime_ns == exported


@pytest.mark.parametrize(
    ("how", "why"), [("fails", "the server has no room"), ("stalls", "no answer of its service")]
)
def test_an_upload_that_fails_or_takes_too_long_is_not_given(config, tmp_path, monkeypatch, capsys, how, why):
    class Run:
        offline = False
        wandb_dir = str(tmp_path / "run" / "wandb")

        def __init__(self) -> None:
            self.settings = self

        def log_artifact(self, artifact: object) -> "Run":
            return self

        def wait(self, timeout: int) -> None:
            if how == "fails":
                raise ValueError("the server has no room")
            stop.wait()

    monkeypatch.setattr(wandb, "init", lambda **options: Run())
    stop = threading.Event()
    monkeypatch.setattr(wandb_run, "_ARTIFACTS_S", 0.5 if how == "stalls" else LIMIT_S)
    give_back(config, again=True)
    stop.set()
    out = capsys.readouterr().out
    assert "artifacts:  W&B did not get run-hf" in out and why in out
    assert json.loads((tmp_path / "run" / RECORD).read_text())["wandb"] is False
