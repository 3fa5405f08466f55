"""A checkpoint gives back every weight and moment to the bit, on any mesh, and unpickles nothing."""

import json
import os
import pickle
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from distributed import run_distributed
from runs import files, full_state, overrides, start_training, write_corpus

from megatsp.checkpoint import paths, store
from megatsp.checkpoint.manifest import MANIFEST, check_files
from megatsp.checkpoint.paths import LATEST, folder_of
from megatsp.checkpoint.state import RunState, state_to_json
from megatsp.compose import compose
from megatsp.data.tokenizer import ByteTokenizer
from megatsp.schema import Config

State = dict[str, torch.Tensor]

SAVED = {
    "tsp2": (2, ["parallel.tsp=2"]),
    "owner2": (2, ["parallel.tsp=2", "parallel.tsp_layout=owner"]),
    "dp2-tsp2": (4, ["parallel.tsp=2", "parallel.dp_shard=2", "trainer.micro_batch_size=1"]),
}


def train_and_gather(config: Config) -> State:
    training = start_training(config)
    training.run()
    return full_state(training)


def load_and_gather(configs: Sequence[Config]) -> list[State]:
    """On a rank: what each configuration's folder gives on its mesh."""
    states = []
    for config in configs:
        training = start_training(config)
        assert (training.state.iteration, training.state.consumed_samples) == (2, 8)
        steps = {int(s["step"]) for s in training.optimizer._optimizer.state.values()}
        assert steps == {2}
        states.append(full_state(training))
    return states


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, State]]:
    """A folder with one run for each of SAVED, two steps long, and what the runs ended with."""
    folder = tmp_path_factory.mktemp("saved")
    write_corpus(folder / "corpus")
    states = {
        name: run_distributed(train_and_gather, world_size, config_of(folder, name, *parallel))[0]
        for name, (world_size, parallel) in SAVED.items()
    }
    return folder, states


def config_of(folder: Path, name: str, *more: str) -> Config:
    short = ["trainer.train_iters=2", "scheduler.lr_warmup_iters=1", "trainer.eval_iters=1"]
    return compose(overrides(folder / "corpus", folder, f"name={name}", *short, *more))


@pytest.mark.parametrize(
    ("world_size", "loads"),
    [
        (1, [("tsp2", []), ("owner2", []), ("dp2-tsp2", [])]),
        (
            2,
            [
                ("tsp2", ["parallel.tsp=2"]),
                ("owner2", ["parallel.tsp=2"]),
                ("tsp2", ["parallel.tsp=2", "parallel.tsp_layout=owner"]),
                ("dp2-tsp2", ["parallel.tsp=2"]),
                ("tsp2", ["parallel.dp_replicate=2"]),
            ],
        ),
        (
            4,
            [
                ("tsp2", ["parallel.tsp=4"]),
                ("dp2-tsp2", ["parallel.tsp=2"]),  # dp_shard 2 again
                ("owner2", ["parallel.tsp=2", "parallel.tsp_layout=owner"]),
                ("dp2-tsp2", ["parallel.tsp=4", "parallel.tsp_layout=owner"]),
            ],
        ),
    ],
)
def test_any_mesh_loads_what_any_other_saved(saved, world_size, loads):
    folder, states = saved
    configs = [config_of(folder, name, "trainer.micro_batch_size=1", *more) for name, more in loads]
    for (name, more), loaded in zip(
        loads, run_distributed(load_and_gather, world_size, configs)[0], strict=True
    ):
        assert loaded.keys() == states[name].keys()
        wrong = [key for key, tensor in loaded.items() if not torch.equal(tensor, states[name][key])]
        assert not wrong, (name, more)
        moments = [tensor for key, tensor in loaded.items() if key.startswith("optimizer.")]
        assert len(moments) == 2 * len(loaded) / 3 and all(moment.any() for moment in moments)


def test_the_folder_is_complete_and_plain(saved):
    folder, _ = saved
    checkpoints = folder / "dp2-tsp2" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["iter_0000002", LATEST]
    assert (checkpoints / LATEST).read_text() == "2\n"
    suffixes = {path.suffix for path in checkpoints.rglob("*") if path.is_file()}
    assert suffixes == {".safetensors", ".json", ".yaml", ".txt"}
    state = json.loads((checkpoints / "iter_0000002" / "state.json").read_text())
    folder = checkpoints / "iter_0000002"
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    assert {"state.json", "tokenizer/megatsp_tokenizer.json"} < found.keys() and found.pop(MANIFEST)
    manifest = check_files(folder)
    assert {n: entry.bytes for n, entry in manifest.files.items()} == {
        n: path.stat().st_size for n, path in found.items()
    }
    assert state.pop("tokenizer_fingerprint") == ByteTokenizer().fingerprint
    counts = {"iteration": 2, "consumed_samples": 8, "consumed_tokens": 256}
    assert len(state.pop("data_key")) == 64 and len(state.pop("recent_losses")) == 2
    expected = json.loads(state_to_json(RunState(**counts, evaluated_at=2, tokenizer="byte")))
    assert state.items() <= expected.items() and "skipped_steps" in state


class Poison:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def load_without_pickle(config: Config) -> State:
    """On a rank: load while every way to unpickle a file raises."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a file is being unpickled")

    pickle.load = pickle.Unpickler = torch.load = refuse
    return full_state(start_training(config))


def test_loading_unpickles_no_file(saved, tmp_path):
    folder, states = saved
    shutil.copytree(folder / "tsp2", tmp_path / "run")
    trace = tmp_path / "unpickled"
    for name in (".metadata", "extra.pt", "state.pkl"):  # .metadata: torch's own name for a pickled index
        poison = pickle.dumps(Poison(trace))
        (tmp_path / "run/checkpoints/iter_0000002" / name).write_bytes(poison)
    config = config_of(folder, "run", f"output_dir={tmp_path}")
    loaded = run_distributed(load_without_pickle, 1, config, fresh=True)[0]
    assert all(torch.equal(tensor, states["tsp2"][name]) for name, tensor in loaded.items())
    assert not trace.exists()


def load_other_tensors(folder: Path, config: Config) -> str:
    """On a rank: the error of loading into a model that is 2 wider in the MLP and has a moment more."""
    training = start_training(config)
    wanted = {**training.optimizer.tensors(), "optimizer.exp_avg.rotor": torch.zeros(3)}
    with pytest.raises(ValueError, match="does not fit this model") as caught:
        store.load(folder, training.gpt, wanted)
    return str(caught.value)


def test_missing_and_mis_shaped_tensors_are_named(saved):
    folder, _ = saved
    config = config_of(folder, "new", "model.ffn_hidden_size=47")
    iteration = folder_of(folder / "tsp2" / "checkpoints", 2)
    message = run_distributed(load_other_tensors, 1, iteration, config)[0]
    # gate, up and down of two layers, with two moments each, and the moment of nothing
    assert "; 19 tensors differ: " in message
    assert "model.layers.0.mlp.gate_proj.weight: wanted (47, 32), found (45, 32)" in message
    small = config_of(folder, "new")
    message = run_distributed(load_other_tensors, 1, iteration, small)[0]
    assert message.endswith("; 1 tensors differ: optimizer.exp_avg.rotor: wanted (3,), found nothing")


def save_and_be_interrupted(config: Config, folder: Path) -> None:
    """On a rank: a save that fails on the way, after one that succeeded."""
    training = start_training(config)
    tensors = training.optimizer.tensors()
    store.save(folder, RunState(iteration=1), training.gpt, tensors, {"config.yaml": b"first"})
    before = files(folder)
    with pytest.raises(RuntimeError, match="rank 0: TypeError"):
        store.save(folder, RunState(iteration=1), training.gpt, tensors, {"config.yaml": None})
    assert files(folder) == before
    assert paths.latest(folder) == folder / "iter_0000001"
    # The same iteration again: what was left lying about is swept away, the old one replaced.
    store.save(folder, RunState(iteration=1), training.gpt, tensors, {"config.yaml": b"second"})
    assert (folder / "iter_0000001" / "config.yaml").read_text() == "second"
    assert sorted(path.name for path in folder.iterdir()) == ["iter_0000001", LATEST]


def test_a_save_that_fails_leaves_the_last_one(saved, tmp_path):
    run_distributed(save_and_be_interrupted, 1, config_of(saved[0], "unsaved"), tmp_path)
