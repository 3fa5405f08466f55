"""The model starts the same on every mesh and layout: first weights are the seed's and the name's."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from distributed import run_distributed
from parity import MODEL
from torch import Tensor

from megatsp.axes import Axes
from megatsp.model.init import ROWS, initial_slice
from megatsp.model.parallelize import build_model
from megatsp.schema import Config, ParallelConfig, TrainerConfig

# h = 40 is no multiple of the 16 rows that are drawn at once, nor are its slices over 2 or 4 ranks.
SETTINGS = replace(MODEL, add_qkv_bias=True, qk_layernorm=True, untie_embeddings_and_output_weights=True)
State = dict[str, Tensor]


def rank_state(tsp: int, layout: str, dp_shard: int = 1, dp_replicate: int = 1, seed: int = 1) -> State:
    """On a rank: the gathered weights."""
    parallel = ParallelConfig(
        tsp, layout, attention_buckets=1, mlp_buckets=tsp, head_buckets=1,
        dp_shard=dp_shard, dp_replicate=dp_replicate,
    )  # fmt: skip
    axes = Axes.build(parallel, torch.device("cpu"))
    gpt = build_model(Config(model=SETTINGS, parallel=parallel, trainer=TrainerConfig(seed=seed)), axes)
    return {name: p.full_tensor().detach() for name, p in gpt.named_parameters()}


@cache
def alone(seed: int = 1) -> State:
    (state,) = run_distributed(rank_state, 1, 1, "hidden", 1, 1, seed)
    return state


@pytest.mark.parametrize("layout", ["hidden", "owner"])
@pytest.mark.parametrize(
    ("tsp", "dp_shard", "dp_replicate"), [(1, 1, 1), (2, 1, 1), (4, 1, 1), (2, 2, 1), (2, 1, 2), (1, 4, 1)]
)
def test_every_mesh_starts_with_the_same_weights(tsp, dp_shard, dp_replicate, layout):
    for state in run_distributed(
        rank_state, tsp * dp_shard * dp_replicate, tsp, layout, dp_shard, dp_replicate
    ):
        assert state.keys() == alone().keys()
        for name, expected in alone().items():
            assert torch.equal(state[name], expected), name


def test_weights_differ_by_seed_and_by_name():
    matrices = {name: t for name, t in alone().items() if t.dim() == 2}
    for name, other in alone(seed=2).items():
        assert torch.equal(other, alone()[name]) == (name not in matrices), name
    by_shape: dict[torch.Size, list[Tensor]] = {}
    for matrix in matrices.values():
        by_shape.setdefault(matrix.shape, []).append(matrix)
    assert max(map(len, by_shape.values())) >= 4  # both layers' gate and up at least
    for alike in by_shape.values():
        for i, matrix in enumerate(alike):
            assert not any(torch.equal(matrix, other) for other in alike[:i])


def test_deviations_are_as_configured():
    std = SETTINGS.init_method_std
    for name, t in alone().items():
        if t.dim() == 1:
            assert torch.equal(t, torch.zeros_like(t) if name.endswith("bias") else torch.ones_like(t)), name
            continue
        # o and down projections are divided by sqrt(2 layers) = 2
        expected = std / 2 if name.split(".")[-2] in ("o_proj", "down_proj") else std
        spread = 4 * expected / (2 * t.numel()) ** 0.5  # four standard errors
        assert abs(t.std().item() - expected) < spread, name
        assert abs(t.mean().item()) < 4 * expected / t.numel() ** 0.5, name


@pytest.mark.parametrize(("rows", "columns"), [((0, 40), (0, 9)), ((3, 5), (2, 9)), ((10, 33), (0, 1))])
def test_a_slice_is_a_slice_of_the_whole(rows, columns):
    whole = initial_slice(1, "a.weight", (0, 40), (0, 9), 9, 0.5)
    assert whole.shape == (40, 9) and 40 % ROWS
    part = initial_slice(1, "a.weight", rows, columns, 9, 0.5)
    assert torch.equal(part, whole[slice(*rows), slice(*columns)])
    assert not torch.equal(whole, initial_slice(1, "b.weight", (0, 40), (0, 9), 9, 0.5))


def test_blocks_of_rows_are_independent():
    whole = initial_slice(1, "a.weight", (0, 2 * ROWS), (0, 64), 64, 1.0)
    first, second = whole.split(ROWS)
    correlation = (first * second).mean().item()
    assert abs(correlation) < 4 / first.numel() ** 0.5
