"""The model starts the same on every mesh and layout: first weights are the seed's and the name's."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import pytest
import torch
from distributed import run_distributed
from parity import MODEL, OLMO2
from torch import Tensor

from megatsp.axes import Axes
from megatsp.model.init import ROWS, initial_slice
from megatsp.model.parallelize import build_model
from megatsp.schema import Config, ParallelConfig, TrainerConfig

# h = 40 is no multiple of the 16 rows that are drawn at once, nor are its slices over 2 or 4 ranks.
SETTINGS = replace(MODEL, add_qkv_bias=True, qk_layernorm=True, untie_embeddings_and_output_weights=True)
State = dict[str, Tensor]


def config_of(seed: int = 1, **parallel) -> Config:
    counts = dict(dp_shard=1, attention_buckets=1, mlp_buckets=parallel.get("tsp", 1), head_buckets=1)
    return Config(
        model=replace(SETTINGS, **{k: parallel.pop(k) for k in list(parallel) if hasattr(SETTINGS, k)}),
        parallel=ParallelConfig(**counts | parallel),
        trainer=TrainerConfig(seed=seed),
    )


def rank_states(configs: Sequence[Config]) -> list[State]:
    """On a rank: the gathered weights."""
    states = []
    for config in configs:
        gpt = build_model(config, Axes.build(config.parallel, torch.device("cpu")))
        states.append({name: p.full_tensor().detach() for name, p in gpt.named_parameters()})
    return states


@cache
def alone(seed: int = 1, **sizes) -> State:
    return run_distributed(rank_states, 1, [config_of(seed, **sizes)])[0][0]


# By ranks. Vocabulary 131 and FFN 107 are uneven over tp; h = 41 and 42 over FSDP's ranks.
MESHES: dict[int, list[dict]] = {
    1: [dict(), dict(tsp_layout="owner")],
    2: [
        dict(tsp=2),
        dict(tsp=2, tsp_layout="owner"),
        dict(tp=2),
        dict(cp=2),
        dict(cp=2, fsdp_over_cp=True),
        dict(dp_shard=2),
        dict(dp_replicate=2),
        dict(dp_shard=2, hidden_size=41),
        dict(tsp=2, **OLMO2),
        dict(dp_shard=2, **OLMO2),
    ],
    4: [
        dict(tsp=4),
        dict(tsp=4, tsp_layout="owner"),
        dict(tsp=2, dp_shard=2),
        dict(tsp=2, dp_shard=2, tsp_layout="owner"),
        dict(tsp=2, dp_replicate=2),
        dict(dp_shard=4),
        dict(dp_replicate=2, dp_shard=2),
        dict(tp=4),
        dict(tp=2, cp=2),
        dict(tp=2, cp=2, fsdp_over_cp=True),
        dict(tp=2, dp_shard=2),
        dict(cp=2, dp_shard=2),
        dict(cp=2, dp_shard=2, fsdp_over_cp=True),
        dict(cp=2, tsp=2),
        dict(cp=2, tsp=2, fsdp_over_cp=True),
        dict(tp=2, dp_shard=2, hidden_size=41),
        dict(tsp=2, dp_shard=2, hidden_size=42),
    ],
}


@pytest.mark.parametrize("world_size", MESHES)
def test_every_mesh_starts_with_the_same_weights(world_size):
    configs = [config_of(**mesh) for mesh in MESHES[world_size]]
    for states in run_distributed(rank_states, world_size, configs):
        for mesh, state in zip(MESHES[world_size], states, strict=True):
            expected = alone(**{k: v for k, v in mesh.items() if hasattr(SETTINGS, k)})
            assert state.keys() == expected.keys()
            wrong = [name for name in expected if not torch.equal(state[name], expected[name])]
            assert not wrong, mesh


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
    for name, t in [*alone().items(), *alone(**OLMO2).items()]:
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
