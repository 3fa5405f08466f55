"""Whole runs on gloo ranks: the mesh changes nothing, a resumed run goes on as if it had never stopped."""

import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dense import DenseGPT
from distributed import run_distributed
from runs import (
    ROOT,
    StopIf,
    files,
    full_state,
    losses,
    overrides,
    start_training,
    train_on_ranks,
    write_corpus,
)
from safetensors.torch import load_file

from megatsp.checkpoint.paths import LATEST
from megatsp.checkpoint.store import read_state
from megatsp.compose import compose
from megatsp.data.blend import Draw
from megatsp.data.loader import read_batch
from megatsp.data.splits import Splits, load_splits
from megatsp.data.tokenizer import ByteTokenizer
from megatsp.schema import Config
from megatsp.training.interval import Interval
from megatsp.training.logs import read_metrics

# By name: the ranks, and what differs from a run on one rank.
MESHES: dict[str, tuple[int, list[str]]] = {
    "one": (1, []),
    "tsp2": (2, ["parallel.tsp=2"]),
    "owner2": (2, ["parallel.tsp=2", "parallel.tsp_layout=owner", "parallel.kv_exchange=ring"]),
    "accumulated": (2, ["parallel.tsp=2", "trainer.micro_batch_size=1"]),
    "at-once": (2, ["parallel.tsp=2", "trainer.micro_batch_size=4"]),
    "tsp4": (4, ["parallel.tsp=4", "trainer.micro_batch_size=4"]),
    "owner4": (4, ["parallel.tsp=4", "parallel.tsp_layout=owner", "trainer.micro_batch_size=4"]),
    "dp2-tsp2": (4, ["parallel.tsp=2", "parallel.dp_shard=2"]),
    "dp2-bf16": (2, ["parallel.dp_shard=2", "trainer.dtype=bf16"]),
    "dp2-owner2": (4, ["parallel.tsp=2", "parallel.dp_shard=2", "parallel.tsp_layout=owner"]),
    "tp2": (2, ["parallel=tp"]),
    "fsdp-cp2": (2, ["parallel=fsdp_cp"]),
}
# Every file of configs/parallel, and on how many ranks it is tried.
PRESETS = {
    "cp": 2, "cp_ring": 2, "cp_tsp": 4, "cp_ulysses": 2, "dp": 2, "fsdp": 4, "fsdp_cp": 4, "hsdp": 4,
    "owner": 4, "tp": 2, "tp_cp": 4, "tsp": 4,
}  # fmt: skip
# At a learning rate of 0.01 the sixth gradient norm would be 50 times as sensitive to rounding as others.
EVERY_FOUR = ["checkpoint.save_interval=4", "trainer.eval_interval=4", "optimizer.lr=0.005"]

# design.md section 5.
STEP_METRICS = {
    "iteration", "consumed-tokens", "lm loss", "grad-norm", "learning-rate", "iteration-time-ms",
    "tokens/s/gpu", "tflops/gpu", "mfu", "memory/peak-gib", "data/wait-ms", "comm/exposed-ms", "comm/bytes",
    "skipped-steps", "loss-spikes", "ranks/busy-ms-max", "ranks/busy-ms-median", "ranks/slowest",
}  # fmt: skip
SAVE_METRICS = {"checkpoint/stall-ms", "checkpoint/save-s", "checkpoint/bytes"}
EVALUATION_METRICS = {"iteration", "consumed-tokens", "val/lm loss", "val/bits-per-byte"}

Entries = list[dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_corpus(folder / "corpus")
    return folder


@pytest.fixture(scope="module")
def entries(folder: Path) -> dict[str, Entries]:
    """Every mesh's metrics.jsonl of ten steps, saved and evaluated at 4, 8 and 10."""
    found: dict[str, Entries] = {}
    for world_size in (1, 2, 4):
        names = [name for name, (ranks, _) in MESHES.items() if ranks == world_size]
        runs = [arguments(folder, name, *MESHES[name][1]) for name in names]
        found |= dict(zip(names, train_on_ranks(world_size, *runs), strict=True))
    return found


def arguments(folder: Path, name: str, *more: str) -> list[str]:
    return overrides(folder / "corpus", folder, f"name={name}", *EVERY_FOUR, *more)


def copy_at_4(folder: Path, name: str, copy: str) -> None:
    """A run as it would be had it died after iteration 10 was logged, and before 8 was saved."""
    shutil.copytree(folder / name, folder / copy)
    (folder / copy / "checkpoints" / LATEST).write_text("4\n")
    for iteration in ("iter_0000008", "iter_0000010"):
        shutil.rmtree(folder / copy / "checkpoints" / iteration)


@pytest.mark.parametrize("name", [name for name in MESHES if name not in ("one", "dp2-bf16")])
def test_losses_are_the_same_on_every_mesh(entries, name):
    alone = entries["one"]
    assert len(losses(alone)) == 10 and losses(alone)[-1] < 0.8 * losses(alone)[0]
    assert losses(entries[name]) == pytest.approx(losses(alone), rel=1e-6, abs=0)
    norms = [[e["grad-norm"] for e in run if "grad-norm" in e] for run in (entries[name], alone)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6, abs=0)
    validation = [[e["val/lm loss"] for e in run if "val/lm loss" in e] for run in (entries[name], alone)]
    assert len(validation[0]) == 3 and validation[0] == pytest.approx(validation[1], rel=1e-6, abs=0)


def rank_steps(configs: Sequence[Config]) -> list[list[tuple[float, float]]]:
    """On a rank: loss and gradient norm of each run's first five steps."""
    trainings = (start_training(config) for config in configs)
    loaders = ((training, training.loader()) for training in trainings)
    results = [[training.step(i, loader) for i in range(1, 6)] for training, loader in loaders]
    return [[(result.loss, result.grad_norm) for result in of_run] for of_run in results]


@pytest.fixture(scope="module")
def preset_steps(folder: Path) -> dict[str, list[tuple[float, float]]]:
    """Five steps of every preset, and of one rank."""
    found = {}
    for world_size in (1, 2, 4):
        names = [name for name, ranks in PRESETS.items() if ranks == world_size] or ["one"]
        configs = [
            compose(
                arguments(
                    folder, "unsaved", f"launch.nproc={world_size}", "trainer.micro_batch_size=1",
                    *([f"parallel={name}"] if name in PRESETS else []),
                )
            )
            for name in names
        ]  # fmt: skip
        found |= dict(zip(names, run_distributed(rank_steps, world_size, configs)[0], strict=True))
    return found


def test_every_preset_is_tried():
    assert PRESETS.keys() == {path.stem for path in (ROOT / "configs" / "parallel").glob("*.yaml")}


@pytest.mark.parametrize("name", PRESETS)
def test_steps_are_the_same_with_every_preset(preset_steps, name):
    for (loss, norm), (alone, norm_alone) in zip(preset_steps[name], preset_steps["one"], strict=True):
        assert loss == pytest.approx(alone, rel=1e-6, abs=0)
        assert norm == pytest.approx(norm_alone, rel=1e-6, abs=0) and norm_alone > 1  # so it is clipped


def test_losses_equal_a_dense_models(entries, folder):
    """The first loss, and its sample order, from the reference alone."""
    config = compose(arguments(folder, "one"))
    data = splits(config).train
    model = run_distributed(initial_weights, 1, compose(arguments(folder, "unsaved")))[0]
    loss = dense_model(config, model).loss(*read_batch(data, data.draw(0, 4))).item()
    assert entries["one"][0]["lm loss"] == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("name", ["tsp2", "dp2-tsp2", "dp2-bf16", "tp2", "fsdp-cp2"])
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(entries, folder, name):
    copy = f"{name}-resumed"
    copy_at_4(folder, name, copy)
    world_size, more = MESHES[name]
    (resumed,) = train_on_ranks(world_size, arguments(folder, copy, *more))
    exact = ("iteration", "consumed-tokens", "lm loss", "grad-norm", "learning-rate", "val/lm loss")
    logged = [[e for e in run if not SAVE_METRICS & e.keys()] for run in (resumed, entries[name])]
    picked = [[{k: e[k] for k in exact if k in e} for e in run] for run in logged]
    assert picked[0] == picked[1]  # no gap, no overlap, the same floating-point numbers
    ends = [folder / run / "checkpoints" / "iter_0000010" for run in (copy, name)]
    shards = sorted(path.name for path in ends[1].glob("*.safetensors"))
    assert shards
    for shard in shards:
        found, wanted = (load_file(end / shard) for end in ends)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in found)
    assert read_state(ends[0]) == read_state(ends[1])


def test_the_checkpoint_that_a_run_was_resumed_from_may_go(entries, folder):
    copy_at_4(folder, "one", "moves-on")
    more = ["checkpoint.save_interval=1", "checkpoint.keep_last=2"]
    (resumed,) = train_on_ranks(1, arguments(folder, "moves-on", *more))
    assert losses(resumed) == losses(entries["one"])
    there = {path.name for path in (folder / "moves-on" / "checkpoints").glob("iter_*")}
    assert there == {"iter_0000009", "iter_0000010"}


def test_a_run_resumed_on_another_mesh_goes_on(entries, folder):
    for name, world_size, more in (
        ("dp2-tsp2", 1, []),
        ("owner2", 1, []),
        ("tp2", 2, ["parallel=tsp"]),
        ("fsdp-cp2", 2, ["parallel=tp"]),
    ):
        copy = f"{name}-elsewhere"
        copy_at_4(folder, name, copy)
        (resumed,) = train_on_ranks(world_size, arguments(folder, copy, *more))
        assert losses(resumed) == pytest.approx(losses(entries["one"]), rel=1e-6, abs=0)


def test_a_finished_run_says_so_and_changes_nothing(entries, folder):
    before = files(folder / "one")
    left = folder / "one" / "checkpoints" / "iter_0000002.removed"  # by a job that was killed at its end
    left.mkdir()
    (left / "shard").write_bytes(b"half of it")
    run_distributed(run_and_print, 1, compose(arguments(folder, "one")), folder / "said")
    assert (folder / "said").read_text() == (
        f"{folder / 'one'} is at iteration 10 already; to go on, raise trainer.train_iters\n"
    )
    after = files(folder / "one")
    del before["checkpoints"], after["checkpoints"]  # its time is that of the removal
    assert after == before


def run_and_print(config: Config, path: Path) -> None:
    """On a rank: a run whose standard output goes to a file."""
    with open(path, "w") as file:
        os.dup2(file.fileno(), 1)
        start_training(config).run()
        print(end="", flush=True)


def test_metrics_have_the_names_of_the_contract(entries, folder):
    steps = [e for e in entries["dp2-tsp2"] if "lm loss" in e]
    evaluations = [e for e in entries["dp2-tsp2"] if "val/lm loss" in e]
    on_slow_machines = {"ranks/slow-host"}
    assert all(e.keys() - on_slow_machines == STEP_METRICS | {"consumed-samples"} for e in steps)
    assert all(e.keys() == EVALUATION_METRICS for e in evaluations)
    assert [e["iteration"] for e in steps] == list(range(1, 11))
    assert [e["iteration"] for e in evaluations] == [4, 8, 10]
    assert [e["consumed-tokens"] for e in steps] == [4 * 32 * i for i in range(1, 11)]
    assert (folder / "dp2-tsp2" / "loss.png").read_bytes().startswith(b"\x89PNG")
    rates = [e["learning-rate"] for e in steps]
    assert rates[:2] == [0.0025, 0.005] and rates[-1] == pytest.approx(0.001)


def test_traffic_is_that_of_training_steps_alone(entries):
    moved = {name: {e["comm/bytes"] for e in run if "comm/bytes" in e} for name, run in entries.items()}
    assert moved["one"] == {0}
    assert all(len(bytes_) == 1 for bytes_ in moved.values()), moved  # those after an evaluation too
    assert min(moved["tsp2"]) > 0


def mean_traffic(config: Config) -> float:
    """On a rank: comm/bytes of two steps with an evaluation in between."""
    training = start_training(config)
    interval, loader = Interval(training.config, training.axes), training.loader()
    for iteration in (1, 2):
        interval.add(training.step(iteration, loader))
        assert training.data.valid is not None
        training.evaluate(training.data.valid, "val")
        interval.restart()
    return interval.take(training.state)["comm/bytes"]


def test_traffic_of_an_interval_skips_the_evaluation_in_it(entries, folder):
    found = run_distributed(mean_traffic, 2, compose(arguments(folder, "unsaved", "parallel.tsp=2")))
    assert found[0] == entries["tsp2"][0]["comm/bytes"]


def initial_weights(config: Config) -> dict[str, torch.Tensor]:
    return {n: p.detach().full_tensor() for n, p in start_training(config).gpt.named_parameters()}


def weights_and_evaluation(config: Config) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    training = start_training(config)
    assert training.data.valid is not None
    return full_state(training), training.evaluate(training.data.valid, "val")


def splits(config: Config) -> Splits:
    return load_splits(config, ByteTokenizer())


def dense_model(config: Config, state: dict[str, torch.Tensor]) -> DenseGPT:
    model = DenseGPT(config.model)
    model.load_state_dict({name: state[name] for name in model.state_dict()})
    return model


@pytest.mark.parametrize(("world_size", "more"), [(2, ["parallel.tsp=2"]), (2, ["parallel.dp_shard=2"])])
@pytest.mark.parametrize("eval_iters", [5, 1000])
def test_evaluation_equals_the_dense_models(entries, folder, world_size, more, eval_iters):
    batches = ["trainer.global_batch_size=6", "trainer.micro_batch_size=3"]
    config = compose(arguments(folder, "one", *batches, f"trainer.eval_iters={eval_iters}", *more))
    state, found = run_distributed(weights_and_evaluation, world_size, config)[0]
    data = splits(config).valid
    assert len(data) > 6 and len(data) % 6  # so that the last global batch is not full
    count = min(6 * eval_iters, len(data))
    spread = [Draw(0, 0, i * len(data) // count) for i in range(count)]  # from the first to the last
    ids, labels, mask, _ = read_batch(data, spread)
    with torch.no_grad():
        loss = dense_model(config, state).loss(ids, labels, mask).item()
    assert (labels == ByteTokenizer().eod).any()  # which is a token of no bytes
    num_bytes = (labels < 256).sum().item()
    assert found["val/lm loss"] == pytest.approx(loss, rel=1e-6)
    bits = loss * labels.numel() / math.log(2)
    assert found["val/bits-per-byte"] == pytest.approx(bits / num_bytes, rel=1e-6)


def stop_at_3(config: Config) -> tuple[int, int]:
    """On a rank: train, with only the last rank asked to stop; returns the last iteration and the status."""
    training = start_training(config)
    is_last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
    status = training.run(StopIf(lambda: is_last and training.state.iteration >= 2))
    return training.state.iteration, status


def test_a_request_to_any_rank_stops_all_after_the_step_and_saves(entries, folder):
    config = compose(arguments(folder, "stopped", "parallel.tsp=2", "logging.log_interval=5"))
    assert run_distributed(stop_at_3, 2, config) == [(3, 75), (3, 75)]
    (only, saved) = read_metrics(folder / "stopped" / "metrics.jsonl")
    assert saved.keys() == {"iteration", *SAVE_METRICS} and saved["checkpoint/bytes"] > 0
    assert only["iteration"] == 3
    assert only["lm loss"] == pytest.approx(np.mean(losses(entries["tsp2"])[:3]), rel=1e-12)
    assert (folder / "stopped" / "checkpoints" / LATEST).read_text() == "3\n"
    (resumed,) = train_on_ranks(2, arguments(folder, "stopped", "parallel.tsp=2"))
    assert losses(resumed)[1:] == losses(entries["tsp2"])[3:]


def test_wandb_logs_offline_under_one_run_id(folder):
    name, more = "wandb", ["logging.wandb=offline", "logging.wandb_project=tests"]
    train_on_ranks(1, arguments(folder, name, *more, "trainer.train_iters=4"))
    (first,) = (folder / name / "wandb").glob("offline-run-*")
    run_id = read_state(folder / name / "checkpoints" / "iter_0000004").wandb_run_id
    assert len(run_id) == 8 and first.name.endswith(f"-{run_id}")
    (log,) = first.glob(f"run-{run_id}.wandb")
    content = log.read_bytes()
    assert content[:4] == b":W&B"
    for metric in ("lm loss", "tokens/s/gpu", "val/bits-per-byte"):
        assert metric.encode() in content
    train_on_ranks(1, arguments(folder, name, *more, "trainer.train_iters=5"))
    assert read_state(folder / name / "checkpoints" / "iter_0000005").wandb_run_id == run_id
