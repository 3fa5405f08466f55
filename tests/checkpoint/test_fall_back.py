"""A run whose newest checkpoint is damaged goes on from the one before, and all its ranks know it."""

import io
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed import run_distributed
from runs import full_state, overrides, start_training, write_corpus

from megatsp.checkpoint import store
from megatsp.checkpoint.manifest import Damaged
from megatsp.checkpoint.paths import folder_of
from megatsp.compose import compose, to_yaml
from megatsp.training.run import Training


def started(folder: Path, *more: str) -> tuple[Training, str]:
    """On a rank: a training, and what it said."""
    said = io.StringIO()
    small = ["model.num_layers=1", "parallel.tsp=2", "name=run", *more]
    with redirect_stdout(said):
        training = start_training(compose(overrides(folder / "corpus", folder, *small)))
    return training, said.getvalue()


def flip_last_byte(folder: Path) -> None:
    if dist.get_rank() == 0:
        for path in folder.glob("*.safetensors"):
            content = path.read_bytes()
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    dist.barrier()


def damage_in_turn(folder: Path) -> None:
    """On a rank: two checkpoints, then what a run of them makes of the newest and of both being damaged."""
    training, said = started(folder)
    assert not said and training.candidates == [] and training.resumed is None
    extra = {"config.yaml": to_yaml(training.config).encode()}
    training.folder.mkdir(exist_ok=True)
    (training.folder / "config.yaml").write_bytes(extra["config.yaml"])
    checkpoints, loader = training.folder / "checkpoints", training.loader()
    states = []
    # Below both an import: a checkpoint of iteration 0, without moments.
    store.save(checkpoints, training.state, training.gpt, {}, extra, training.tokenizer)
    imported = {name: tensor.clone() for name, tensor in full_state(training).items()}
    for iteration in (1, 2):
        training.step(iteration, loader)
        moments = training.optimizer.tensors()
        store.save(checkpoints, training.state, training.gpt, moments, extra, training.tokenizer)
        states.append({name: tensor.clone() for name, tensor in full_state(training).items()})
    loader.close()
    one, two = folder_of(checkpoints, 1), folder_of(checkpoints, 2)

    resumed, said = started(folder, "optimizer.lr=0.02", "trainer.micro_batch_size=4")
    assert resumed.resumed is not None and resumed.resumed.folder == two and resumed.resumed.seconds > 0
    is_first = dist.get_rank() == 0
    changed = "trainer.micro_batch_size 2 -> 4, optimizer.lr 0.01 -> 0.02"
    assert sorted(said.strip().removeprefix("changed since iter_0000002: ").split(", ")) == (
        sorted(changed.split(", ")) if is_first else [""]
    )

    flip_last_byte(two)
    resumed, said = started(folder)
    assert resumed.resumed_from == one and resumed.state.iteration == 1
    found = full_state(resumed)
    assert all(torch.equal(tensor, states[0][name]) for name, tensor in found.items())
    lines = said.splitlines()
    assert len(lines) == (2 if is_first else 0)
    if is_first:
        assert lines[0].startswith(f" passed over: {two} is damaged: shard-") and "has checksum" in lines[0]
        assert lines[1] == f" resumes from {one}, the newest checkpoint that is whole"
    with pytest.raises(Damaged, match="iter_0000002 is damaged: .* set checkpoint.strict=false"):
        started(folder, "checkpoint.strict=true")
    assert started(folder, "checkpoint.verify=sizes")[0].state.iteration == 2  # as was asked for

    flip_last_byte(one)
    resumed, _ = started(folder)
    assert resumed.resumed_from == folder_of(checkpoints, 0) and resumed.state.iteration == 0
    found = full_state(resumed)  # with moments of zeros, whatever was read of the damaged ones
    assert all(torch.equal(tensor, imported[name]) for name, tensor in found.items())

    flip_last_byte(folder_of(checkpoints, 0))
    with pytest.raises(Damaged, match="no checkpoint is whole: .*iter_0000002 .*iter_0000001 "):
        started(folder)
    with pytest.raises(ValueError, match="holds another run; it differs in trainer.seed: 1234") as caught:
        started(folder, "trainer.seed=7")
    assert not isinstance(caught.value, Damaged)


def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path):
    write_corpus(tmp_path / "corpus")
    run_distributed(damage_in_turn, 2, tmp_path)
