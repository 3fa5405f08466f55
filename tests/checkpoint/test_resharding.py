"""Saved on one mesh, resumed on any other: the same weights and moments, and the losses of a run never cut.

Every mesh saves after step 3 and goes on for ten steps; every mesh then goes on from what each one saved.
"""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from distributed import run_distributed
from runs import full_state, overrides, start_training, write_corpus

from megatsp.checkpoint.saver import Saved, Saver
from megatsp.checkpoint.store import named_tensors
from megatsp.compose import compose, to_yaml
from megatsp.schema import Config
from megatsp.training.run import Training

MESHES: dict[str, tuple[int, list[str]]] = {
    "one": (1, []),
    "owner2": (2, ["parallel.tsp=2", "parallel.tsp_layout=owner"]),
    "tsp4": (4, ["parallel.tsp=4"]),
    "dp2-tsp2": (4, ["parallel.tsp=2", "parallel.dp_shard=2", "trainer.micro_batch_size=2"]),
    "tp2-cp2": (4, ["parallel=tp_cp", "launch.nproc=4"]),
}
SAVED_AT, MORE = 3, 10

State = dict[str, torch.Tensor]
Losses = list[float]


def config_of(folder: Path, name: str, mesh: str) -> Config:
    """The run `name`, on a mesh; its learning rate magnifies no rounding: see test_run.py."""
    small = ["trainer.micro_batch_size=4", "model.num_layers=1", "optimizer.lr=0.005"]
    more = [*small, "trainer.train_iters=13", f"name={name}", *MESHES[mesh][1]]
    return compose(overrides(folder / "corpus", folder, *more))


def next_losses(training: Training, count: int) -> Losses:
    loader, start = training.loader(), training.state.iteration
    found = [training.step(start + i, loader).loss for i in range(1, count + 1)]
    loader.close()
    return found


def state_of(training: Training) -> State:
    """The logical tensors as they are now: of one rank they would be the model's own."""
    return {name: tensor.clone() for name, tensor in full_state(training).items()}


def save_and_go_on(configs: Sequence[Config]) -> list[tuple[State, Losses]]:
    """On a rank: what each run saved, and its losses after that."""
    found = []
    for config in configs:
        training = start_training(config)
        next_losses(training, SAVED_AT)
        training.folder.mkdir(exist_ok=True)
        (training.folder / "config.yaml").write_text(to_yaml(training.config))
        moments, extra = training.optimizer.tensors(), {"config.yaml": to_yaml(training.config).encode()}
        checkpoints = training.folder / "checkpoints"
        saver = Saver(checkpoints, training.config.checkpoint)
        tensors = named_tensors(training.gpt, moments)
        saver.save(training.state, tensors, extra, training.tokenizer)  # beside the steps that follow
        found.append((state_of(training), next_losses(training, MORE)))
        assert isinstance(saver.close(), Saved)
    return found


def resume(configs: Sequence[Config]) -> list[tuple[State, Losses]]:
    """On a rank: what each run was resumed with, and its losses after that."""
    found = []
    for config in configs:
        training = start_training(config)
        assert training.state.iteration == SAVED_AT and training.state.consumed_samples == 4 * SAVED_AT
        found.append((state_of(training), next_losses(training, MORE)))
    return found


def both(saves: Sequence[Config], resumes: Sequence[Config]) -> tuple[list, list]:
    return save_and_go_on(saves), resume(resumes)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict]:
    """What was saved, by mesh, and what was resumed, by the mesh that saved and the one that resumed."""
    folder = tmp_path_factory.mktemp("resharding")
    write_corpus(folder / "corpus")
    saved, resumed = {}, {}
    for world_size, saves, resumes in ((1, True, False), (2, True, False), (4, True, True), (2, False, True),
                                       (1, False, True)):  # fmt: skip
        here = [name for name, (ranks, _) in MESHES.items() if ranks == world_size]
        pairs = [(old, new) for old in MESHES for new in here] if resumes else []
        names = here if saves else []
        configs = [config_of(folder, name, name) for name in names], [config_of(folder, *p) for p in pairs]
        found = run_distributed(both, world_size, *configs)[0]
        saved |= dict(zip(names, found[0], strict=True))
        resumed |= dict(zip(pairs, found[1], strict=True))
    return saved, resumed


@pytest.mark.parametrize("new", MESHES)
@pytest.mark.parametrize("old", MESHES)
def test_any_mesh_goes_on_from_what_any_other_saved(runs, old, new):
    (state, losses), (found, found_losses) = runs[0][old], runs[1][old, new]
    assert found.keys() == state.keys() and any(name.startswith("optimizer.") for name in found)
    assert not [name for name, tensor in found.items() if not torch.equal(tensor, state[name])]
    assert all(tensor.any() for tensor in state.values())
    assert len(losses) == MORE and losses[-1] < losses[0]
    if old == new:
        assert found_losses == losses
    else:
        assert found_losses == pytest.approx(losses, rel=1e-6, abs=0)
