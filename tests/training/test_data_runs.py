"""Whole runs on blended and packed data: which sample comes next depends on the cursor alone."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from dense import DenseGPT
from distributed import run_distributed
from runs import command, losses, overrides, start_training, train_on_ranks, write_corpus
from waiting import LIMIT_S, wait_until_gone

from megatsp.checkpoint.paths import LATEST
from megatsp.compose import compose
from megatsp.data.loader import read_batch
from megatsp.data.splits import load_splits
from megatsp.data.tokenizer import ByteTokenizer
from megatsp.schema import Config

PACKED = ("data.packing=best_fit", "optimizer.lr=0.005")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_corpus(folder / "a")
    write_corpus(folder / "b", documents=12)
    return folder


def arguments(folder: Path, name: str, *more: str) -> list[str]:
    blend = f"data.path=[0.7,{folder}/a,0.3,{folder}/b]"
    return overrides(folder / "a", folder, f"name={name}", blend, *PACKED, *more)


def test_a_run_whose_whole_cluster_changes_on_the_way_reads_the_same_samples(folder):
    """Ranks, axes, micro-batch and readers differ from leg to leg; losses are those of one rank to 1e-6."""
    (alone,) = train_on_ranks(1, arguments(folder, "alone"))
    legs = [
        (2, 3, ["parallel.tsp=2", "trainer.micro_batch_size=4"]),
        (4, 5, ["parallel.tsp=2", "parallel.dp_shard=2", "trainer.micro_batch_size=1", "data.num_workers=1"]),
        (2, 8, ["parallel=fsdp", "trainer.micro_batch_size=2"]),
        (4, 10, ["parallel=tp_cp", "trainer.micro_batch_size=4"]),
    ]
    for world_size, until, more in legs:
        # The schedule is that of all ten iterations.
        lasting = [f"trainer.train_iters={until}", "scheduler.lr_decay_iters=10"]
        (entries,) = train_on_ranks(world_size, arguments(folder, "moving", *lasting, *more))
    assert len(losses(entries)) == 10
    assert losses(entries) == pytest.approx(losses(alone), rel=1e-6, abs=0)
    norms = [[e["grad-norm"] for e in run if "grad-norm" in e] for run in (entries, alone)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5, abs=0)


def first_step(configs: Sequence[Config]) -> list[tuple[float, dict[str, torch.Tensor]]]:
    """On a rank: each run's first loss, and the weights that it was of."""
    found = []
    for config in configs:
        training = start_training(config)
        weights = {n: p.detach().full_tensor().clone() for n, p in training.gpt.named_parameters()}
        found.append((training.step(1, training.loader()).loss, weights))
    return found


@pytest.mark.parametrize("world_size, more", [(1, []), (4, ["parallel.tsp=4", "trainer.micro_batch_size=4"])])
def test_the_loss_of_packed_documents_is_that_of_each_document_alone(folder, world_size, more):
    ways = [f"data.packing={packing}" for packing in ("greedy", "best_fit", "pad")]
    ways.append("data.packing=concat data.reset_attention_mask=true")
    # Wide enough for several documents; weights so large that tokens matter to each other.
    more = [*more, "trainer.seq_length=512", "data.valid_fraction=0", "model.init_method_std=0.5"]
    configs = [compose(arguments(folder, "unsaved", *way.split(), *more)) for way in ways]
    for config, (loss, weights) in zip(
        configs, run_distributed(first_step, world_size, configs)[0], strict=True
    ):
        train = load_splits(config, ByteTokenizer()).train
        batch = read_batch(train, train.draw(0, config.trainer.global_batch_size))
        dense = DenseGPT(config.model)
        dense.load_state_dict({name: weights[name] for name in dense.state_dict()})
        assert (batch[3].diff(dim=1) != 0).any()  # there are borders in it
        assert loss == pytest.approx(dense.loss(*batch).item(), rel=1e-6)
        if config.data.packing != "pad":
            assert dense.loss(*batch[:3]).item() != pytest.approx(loss, rel=1e-3)  # borders matter


def test_resuming_on_other_data_is_refused_and_on_moved_data_is_not(folder):
    run = arguments(folder, "resumed", "trainer.train_iters=2", "scheduler.lr_warmup_iters=1")
    train_on_ranks(1, run)
    longer = [*run, "trainer.train_iters=3"]
    with pytest.raises(
        AssertionError, match=r"holds a run on other data: it differs in data.path: .* there, .* now"
    ):
        train_on_ranks(1, [*longer, f"data.path=[0.6,{folder}/a,0.4,{folder}/b]"])
    with pytest.raises(AssertionError, match=r"differs in data.packing: 'best_fit' there, 'greedy' now"):
        train_on_ranks(1, [*longer, "data.packing=greedy"])
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    for name in "ab":
        for file in folder.glob(f"{name}.*"):
            shutil.copy(file, elsewhere)
    write_corpus(elsewhere / "b", documents=13)
    moved = f"data.path=[0.7,{elsewhere}/a,0.3,{elsewhere}/b]"
    with pytest.raises(AssertionError, match="holds a run on other data"):
        train_on_ranks(1, [*longer, moved])
    write_corpus(elsewhere / "b", documents=12)
    (entries,) = train_on_ranks(1, [*longer, moved, "data.num_workers=1", "data.valid_fraction=0.25"])
    assert len(losses(entries)) == 3


def test_validation_and_test_are_evaluated_where_there_are_any(folder):
    runs = [
        arguments(
            folder, "tested", "trainer.train_iters=4", "trainer.eval_interval=2", "data.test_fraction=0.2"
        ),
        arguments(folder, "untested", "trainer.train_iters=4", "data.valid_fraction=0"),
    ]
    tested, untested = train_on_ranks(1, *runs)
    assert [e["iteration"] for e in tested if "val/lm loss" in e] == [2, 4]
    assert [(e["iteration"], sorted(e)) for e in tested if "test/lm loss" in e] == [
        (4, ["consumed-tokens", "iteration", "test/bits-per-byte", "test/lm loss"])
    ]
    assert not any(key.startswith(("val/", "test/")) for entry in untested for key in entry)
    assert all(math.isfinite(e["data/wait-ms"]) for e in tested if "lm loss" in e)


def running(folder: Path, name: str) -> tuple[subprocess.Popen, list[int]]:
    """A run of two ranks with two readers each in its third iteration, and all processes that it started."""
    given = arguments(folder, name, "trainer.train_iters=100000", "data.num_workers=2", "parallel.tsp=2")
    job = command("train", *given, "launch.nproc=2", "launch.max_restarts=0")
    assert job.stdout is not None
    for line in job.stdout:
        if re.match(r" iteration +3/", line):
            break
    started = descendants(job.pid)
    assert len(started) >= 2 + 4
    return job, started


def test_ctrl_c_ends_the_processes_that_read_ahead(folder, interruptible):
    job, started = running(folder, "interrupted")
    for pid in (job.pid, *started):  # as a terminal does: to all of them
        os.kill(pid, signal.SIGINT)
    out, err = job.communicate(timeout=LIMIT_S)
    assert job.returncode == 0 and "interrupted: stopped after iteration" in out, err
    assert "Traceback" not in err
    wait_until_gone(*started)
    assert (folder / "interrupted" / "checkpoints" / LATEST).read_text().strip().isdigit()
    entries = (folder / "interrupted" / "metrics.jsonl").read_text().splitlines()
    assert "data/wait-ms" in json.loads(entries[0])


def test_readers_end_with_a_rank_that_is_killed(folder):
    job, started = running(folder, "killed")
    rank = next(pid for pid in started if stat(pid)[1] == str(job.pid))
    os.kill(rank, signal.SIGKILL)
    _, err = job.communicate(timeout=LIMIT_S)
    assert job.returncode != 0 and "killed by SIGKILL" in err
    wait_until_gone(*started)


def test_a_signal_to_every_process_saves_as_one_to_the_launcher_does(folder):
    job, started = running(folder, "told")
    for pid in started:  # as a scheduler may do; readers too
        os.kill(pid, signal.SIGTERM)
    os.kill(job.pid, signal.SIGTERM)
    out, err = job.communicate(timeout=LIMIT_S)
    assert job.returncode == 75, err
    assert "Traceback" not in err
    wait_until_gone(*started)
    saved = int((folder / "told" / "checkpoints" / LATEST).read_text())
    assert f"stopped after iteration {saved};" in out


def stat(pid: int | str) -> list[str]:
    """State, parent and more of a process; nothing if it has gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def descendants(pid: int) -> list[int]:
    """Processes that a process started, and those that these started."""
    parents = {int(p.name): int(fields[1]) for p in Path("/proc").glob("[0-9]*") if (fields := stat(p.name))}
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found[1:]
