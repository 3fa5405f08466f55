"""A run folder is new, resumed or refused, and looking at it changes nothing."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from runs import files
from waiting import LIMIT_S

from megatsp.checkpoint.manifest import FIX, MANIFEST, Damaged, Manifest, write_manifest
from megatsp.checkpoint.paths import LATEST, folder_of
from megatsp.checkpoint.state import RunState, state_to_json
from megatsp.checkpoint.store import write_files
from megatsp.compose import to_yaml
from megatsp.schema import Config
from megatsp.training.folder import Busy, changed_settings, find_checkpoints, lock, run_folder, set_aside


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(name="mine", output_dir=str(tmp_path))


def make_run(config: Config, iteration: int = 0) -> Path:
    """The files of a run that find_checkpoint looks at; iteration 0: it has no checkpoint."""
    folder = run_folder(config)
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(config))
    if iteration:
        make_checkpoint(config, iteration)
        (folder / "checkpoints" / LATEST).write_text(f"{iteration}\n")
    return folder


def make_checkpoint(config: Config, iteration: int) -> Path:
    """One that holds no tensors."""
    folder = folder_of(run_folder(config) / "checkpoints", iteration)
    folder.mkdir(parents=True)
    state = state_to_json(RunState(iteration=iteration))
    files = write_files(folder, {"config.yaml": to_yaml(config).encode(), "state.json": state})
    write_manifest(folder, Manifest(files, {}))
    return folder


def find_checkpoint(config: Config) -> Path | None:
    """The newest one, of which nothing is to be said."""
    said: list[str] = []
    found = find_checkpoints(config, said.append)
    assert not said
    return found[0] if found else None


def test_new(config):
    assert find_checkpoint(config) is None
    run_folder(config).mkdir()
    assert find_checkpoint(config) is None  # an empty folder is nobody's
    for name in ("hangs", "out_of_memory"):  # of a run that failed before it began
        (run_folder(config) / name).mkdir()
    assert find_checkpoint(config) is None


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
    shutil.rmtree(folder / "checkpoints")
    make_checkpoint(config, 0)
    (folder / "checkpoints" / LATEST).write_text("0\n")
    changed = replace(config, trainer=replace(config.trainer, seed=7, seq_length=64))
    assert find_checkpoint(changed) == folder / "checkpoints" / "iter_0000000"
    with pytest.raises(ValueError, match="model.num_layers: 4 there, 5 now"):
        find_checkpoint(replace(config, model=replace(config.model, num_layers=5)))


def test_a_run_without_a_checkpoint_begins_anew_and_its_metrics_are_kept(config):
    folder = make_run(config)
    assert find_checkpoint(config) is None
    assert set_aside(folder) == ""  # it did not come to its first log line
    metrics = folder / "metrics.jsonl"
    metrics.write_text('{"iteration": 0, "val/lm loss": 5.0}\n')
    assert set_aside(folder) == "" and metrics.exists()  # nor to its first step
    for aside in ("metrics.1.jsonl", "metrics.2.jsonl"):
        metrics.write_text(f'{{"iteration": 10, "of": "{aside}"}}\n')
        assert find_checkpoint(config) is None
        assert set_aside(folder).endswith(f"begins anew, and keeps its metrics in {aside}")
        assert not metrics.exists() and aside in (folder / aside).read_text()


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


@pytest.mark.parametrize("text", ["newest", ""])
def test_without_a_readable_pointer_the_newest_whole_one_is_taken(config, text):
    folder = make_run(config, 20)
    older, newest = make_checkpoint(config, 10), make_checkpoint(config, 30)
    (newest / "state.json").unlink()
    (folder / "checkpoints" / LATEST).write_text(text)
    said: list[str] = []
    assert find_checkpoints(config, said.append) == [folder / "checkpoints" / "iter_0000020", older]
    assert "names no checkpoint: the newest whole one of 3 is taken" in said[0]
    assert "iter_0000030 is damaged: state.json, of" in said[1] and "is missing" in said[1]
    strict = replace(config, checkpoint=replace(config.checkpoint, strict=True))
    with pytest.raises(ValueError, match="checkpoint.strict=true"):
        find_checkpoints(strict, said.append)


def test_none_newer_than_the_pointer_says(config):
    folder = make_run(config, 20)
    make_checkpoint(config, 30)
    assert find_checkpoint(config) == folder / "checkpoints" / "iter_0000020"


def test_damaged_ones_are_named_and_passed_over(config):
    folder = make_run(config, 20)
    older, newest = make_checkpoint(config, 10), folder / "checkpoints" / "iter_0000020"
    whole = (newest / "config.yaml").read_text()
    (newest / "config.yaml").write_text(whole.replace("1234", "1235"))  # of the same size, and no other run
    said: list[str] = []
    assert find_checkpoints(config, said.append) == [older]
    assert len(said) == 1 and said[0].startswith(
        f"passed over: {newest} is damaged: config.yaml has checksum"
    )
    assert FIX not in said[0]  # the run goes on
    strict = replace(config, checkpoint=replace(config.checkpoint, strict=True))
    with pytest.raises(Damaged, match="set checkpoint.strict=false to go on from an older one"):
        find_checkpoints(strict, said.append)
    (older / MANIFEST).unlink()
    with pytest.raises(Damaged, match="has no whole checkpoint: ") as caught:  # never a new run
        find_checkpoints(config, said.append)
    assert "iter_0000020 is damaged" in str(caught.value) and "iter_0000010 has no" in str(caught.value)


def test_a_pointer_to_nothing_is_no_new_run(config):
    folder = make_run(config)
    (folder / "checkpoints").mkdir()
    for text, message in (("40", "iter_0000040 is not there"), ("newest", "names no checkpoint")):
        (folder / "checkpoints" / LATEST).write_text(text)
        with pytest.raises(Damaged, match=message):
            find_checkpoint(config)


def test_a_replacement_that_was_cut_off_is_undone(config):
    folder = make_run(config, 20) / "checkpoints"
    (folder / "iter_0000020").rename(folder / "iter_0000020.old")
    assert find_checkpoint(config) == folder / "iter_0000020"
    make_checkpoint(config, 30).rename(folder / "iter_0000020.old")  # cut off later: both are there
    assert find_checkpoint(config) == folder / "iter_0000020"
    assert sorted(path.name for path in folder.iterdir()) == ["iter_0000020", LATEST]


def test_what_a_resumed_run_changes_is_said(config):
    found = make_run(config, 20) / "checkpoints" / "iter_0000020"
    assert changed_settings(config, found) == ""
    changed = replace(
        config,
        optimizer=replace(config.optimizer, lr=1.0),
        trainer=replace(config.trainer, global_batch_size=16),
    )
    batch, lr = config.trainer.global_batch_size, config.optimizer.lr
    said = changed_settings(changed, found)
    assert said.startswith("changed since iter_0000020: ") and said.count("->") == 2
    assert f"optimizer.lr {lr} -> 1.0" in said and f"trainer.global_batch_size {batch} -> 16" in said


def test_two_runs_do_not_share_a_folder(config):
    folder = run_folder(config)
    with (
        lock(folder),
        pytest.raises(ValueError, match=f"process {os.getpid()} on .* trains in"),
        lock(folder),
    ):
        pass
    with lock(folder):  # the first has let go
        assert find_checkpoint(config) is None


def test_a_folder_that_cannot_be_made_is_named(config):
    run_folder(config).parent.joinpath("file").write_text("")
    unreachable = run_folder(config).parent / "file" / "run"
    with pytest.raises(ValueError, match="cannot write to .*file/run: .*output_dir="), lock(unreachable):
        pass


def test_a_jobs_attempt_waits_for_what_the_one_before_left(tmp_path):
    folder = tmp_path / "run"
    with lock(folder), pytest.raises(Busy, match="trains in"), lock(folder, patience_s=0.6):
        pass
    held, looks = lock(folder), []

    def is_asked(release: int, end: int) -> bool:
        looks.append(len(looks) + 1)
        if looks[-1] == release:
            held.__exit__(None, None, None)
        return looks[-1] == end

    held.__enter__()
    with lock(folder, patience_s=LIMIT_S, is_asked=lambda: is_asked(release=3, end=9)):
        assert looks == [1, 2, 3]  # it looked in vain, and then at once
    looks.clear()
    ended = lock(folder, patience_s=LIMIT_S, is_asked=lambda: is_asked(release=9, end=2))
    with lock(folder), pytest.raises(Busy), ended:
        pass
    assert looks == [1, 2]
