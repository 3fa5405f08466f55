"""A run folder is new, resumed or refused, and looking at it changes nothing."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from runs import files

from megatsp.checkpoint.paths import LATEST, folder_of
from megatsp.compose import to_yaml
from megatsp.schema import Config
from megatsp.training.folder import find_checkpoint, lock, run_folder


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(name="mine", output_dir=str(tmp_path))


def make_run(config: Config, iteration: int = 0) -> Path:
    """The files of a run that find_checkpoint looks at; iteration 0: it has no checkpoint."""
    folder = run_folder(config)
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(config))
    if iteration:
        checkpoint = folder_of(folder / "checkpoints", iteration)
        checkpoint.mkdir(parents=True)
        (checkpoint / "config.yaml").write_text(to_yaml(config))
        (checkpoint / "state.json").write_text("{}")
        (folder / "checkpoints" / LATEST).write_text(f"{iteration}\n")
    return folder


def test_new(config):
    assert find_checkpoint(config) is None
    run_folder(config).mkdir()
    assert find_checkpoint(config) is None  # an empty folder is nobody's


def test_resumed(config):
    folder = make_run(config, 20)
    assert find_checkpoint(config) == folder / "checkpoints" / "iter_0000020"


def test_what_a_resumed_run_may_change(config):
    folder = make_run(config, 20)
    changed = replace(
        config,
        parallel=replace(config.parallel, tsp=4, tsp_layout="owner"),
        optimizer=replace(config.optimizer, lr=1.0),
        trainer=replace(config.trainer, train_iters=999, global_batch_size=16, dtype="bf16"),
    )
    assert find_checkpoint(changed) == folder / "checkpoints" / "iter_0000020"


@pytest.mark.parametrize(
    ("group", "key", "value", "message"),
    [
        ("model", "hidden_size", 64, "model.hidden_size: 128 there, 64 now"),
        ("optimizer", "name", "apex_fused_adam", "optimizer.name: 'adamw' there"),
        ("trainer", "seq_length", 512, "trainer.seq_length: 256 there, 512 now"),
        ("trainer", "seed", 1, "trainer.seed: 1234 there, 1 now"),
        ("finetune", "lora_rank", 8, "finetune.lora_rank: 0 there, 8 now"),
        ("finetune", "lora_alpha", 8.0, "finetune.lora_alpha: 16.0 there, 8.0 now"),
        ("finetune", "lora_targets", ["q_proj"], "finetune.lora_targets: ['q_proj', 'k_proj'"),
        ("finetune", "hf", "theirs", "finetune.hf: '' there, 'theirs' now"),
    ],
)
def test_another_run_is_refused(config, group, key, value, message):
    folder = make_run(config, 20)
    before = files(folder)
    with pytest.raises(ValueError, match="holds another run; it differs in ") as caught:
        find_checkpoint(replace(config, **{group: replace(getattr(config, group), **{key: value})}))
    assert message in str(caught.value) and "choose another name=" in str(caught.value)
    assert files(folder) == before


def test_an_import_becomes_any_run_of_its_model(config):
    folder = make_run(config, 20)
    (folder / "checkpoints" / "iter_0000020").rename(folder / "checkpoints" / "iter_0000000")
    (folder / "checkpoints" / LATEST).write_text("0\n")
    changed = replace(config, trainer=replace(config.trainer, seed=7, seq_length=64))
    assert find_checkpoint(changed) == folder / "checkpoints" / "iter_0000000"
    with pytest.raises(ValueError, match="model.num_layers: 4 there, 5 now"):
        find_checkpoint(replace(config, model=replace(config.model, num_layers=5)))


def test_a_run_without_a_checkpoint_is_refused(config):
    folder = make_run(config)
    assert find_checkpoint(config) is None  # it did not come to its first log line
    (folder / "metrics.jsonl").write_text('{"iteration": 0, "val/lm loss": 5.0}\n')
    assert find_checkpoint(config) is None  # nor to its first step
    (folder / "metrics.jsonl").write_text('{"iteration": 10}\n')
    with pytest.raises(ValueError, match="has no checkpoint to resume from: choose another name="):
        find_checkpoint(config)


def test_what_is_no_run_is_refused(config):
    folder = run_folder(config)
    folder.write_text("a file")
    with pytest.raises(ValueError, match="exists and is not a run of megatsp"):
        find_checkpoint(config)
    folder.unlink()
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="exists and is not a run of megatsp"):
        find_checkpoint(config)


@pytest.mark.parametrize("text", ["40", "newest", ""])
def test_a_pointer_to_nothing_names_what_exists(config, text):
    folder = make_run(config, 20)
    (folder / "checkpoints" / LATEST).write_text(text)
    with pytest.raises(ValueError, match="there is no such checkpoint beside it") as caught:
        find_checkpoint(config)
    assert f"says {text!r}" in str(caught.value) and "(iter_0000020)" in str(caught.value)


def test_two_runs_do_not_share_a_folder(config):
    folder = run_folder(config)
    with lock(folder), pytest.raises(ValueError, match=f"process {os.getpid()} trains in"), lock(folder):
        pass
    with lock(folder):  # the first has let go
        assert find_checkpoint(config) is None


def test_a_folder_that_cannot_be_made_is_named(config):
    run_folder(config).parent.joinpath("file").write_text("")
    unreachable = run_folder(config).parent / "file" / "run"
    with pytest.raises(ValueError, match="cannot write to .*file/run: .*output_dir="), lock(unreachable):
        pass
