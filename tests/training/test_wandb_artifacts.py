"""What `megatsp sft` exports becomes artifacts of the run in W&B."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from wandb_files import parsed

from megatsp.schema import Config, FinetuneConfig, LoggingConfig
from megatsp.training import give_back as module
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
    assert log_exports(disabled, tmp_path / "run", []).startswith("artifacts:  none")
    (tmp_path / "run" / "wandb_run_id").unlink()
    assert log_exports(config, tmp_path / "run", []).startswith("artifacts:  none")
    assert not (tmp_path / "run" / "wandb").exists()
