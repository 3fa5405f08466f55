"""Weights and moments saved under any way to spread them load under any other, to the bit."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from distributed import run_distributed
from parity import MODEL, case, load, shard_of, weights
from torch import Tensor
from torch.distributed.tensor import DTensor

from megatsp.axes import Axes
from megatsp.checkpoint import store
from megatsp.checkpoint.paths import folder_of
from megatsp.checkpoint.state import RunState
from megatsp.model.gpt import GPT
from megatsp.model.parallelize import build_model
from megatsp.training.optimizer import AdamW

# By ranks. FFN 107 and vocabulary 131 are uneven over tp, h over FSDP's ranks, within tsp's shards too.
SCHEMES: dict[int, dict[str, dict]] = {
    1: {"one": dict()},
    2: {
        "tp": dict(tp=2),
        "tsp": dict(tsp=2),
        "owner": dict(tsp=2, tsp_layout="owner"),
        "cp": dict(cp=2),
        "fsdp_cp": dict(cp=2, fsdp_over_cp=True),
        "fsdp": dict(dp_shard=2),
    },
    4: {
        "tp_cp": dict(tp=2, cp=2),
        "tp_fsdp_cp": dict(tp=2, cp=2, fsdp_over_cp=True),
        "cp_tsp": dict(tsp=2, cp=2),
        "fsdp_cp_tsp": dict(tsp=2, cp=2, fsdp_over_cp=True),
        "fsdp_owner": dict(tsp=2, dp_shard=2, tsp_layout="owner"),
        "hsdp": dict(dp_shard=2, dp_replicate=2),
        "fsdp4": dict(dp_shard=4),
        "tp4": dict(tp=4),
    },
}
WIDTHS = (42, 41)  # the latter without tsp, which must divide it


def schemes(world_size: int, width: int) -> dict[str, dict]:
    return {n: s for n, s in SCHEMES[world_size].items() if "tsp" not in s or width % s["tsp"] == 0}


def model_keys(width: int) -> dict:
    """Of a model that has every kind of parameter."""
    return dict(num_layers=1, hidden_size=width, add_qkv_bias=True, qk_layernorm=True,
                untie_embeddings_and_output_weights=True)  # fmt: skip


def built(scheme: dict, width: int) -> tuple[GPT, dict[str, Tensor]]:
    """On a rank: the model and its optimizer's tensors."""
    case_ = case(**model_keys(width), **scheme)
    gpt = build_model(case_.config(), Axes.build(case_.parallel, torch.device("cpu")))
    return gpt, AdamW(gpt, case_.config().optimizer).tensors()


def expected(width: int) -> dict[str, Tensor]:
    """The logical tensors: weights, and moments that are nowhere zero."""
    state = weights(replace(MODEL, **model_keys(width)))
    generator = torch.Generator().manual_seed(width)
    moments = {
        f"optimizer.{moment}.{name}": torch.rand(t.shape, generator=generator) + 0.1
        for name, t in state.items()
        for moment in ("exp_avg", "exp_avg_sq")
    }
    return {**state, **moments}


def shards(gpt: GPT, moments: dict[str, Tensor]) -> Iterator[tuple[str, DTensor]]:
    for name, tensor in {**dict(gpt.named_parameters()), **moments}.items():
        assert isinstance(tensor, DTensor)
        yield name, tensor.detach()


def save_all(folder: Path, width: int, world_size: int) -> None:
    """On a rank: one checkpoint of the expected tensors under each scheme."""
    whole = expected(width)
    for name, scheme in schemes(world_size, width).items():
        gpt, moments = built(scheme, width)
        load(gpt, {name: t for name, t in whole.items() if not name.startswith("optimizer.")})
        for key, moment in moments.items():
            assert isinstance(moment, DTensor)
            moment.to_local().copy_(shard_of(whole[key], moment))
        store.save(folder / name, RunState(iteration=1), gpt, moments, {})


def load_all(folder: Path, width: int, world_size: int, saved: Sequence[str]) -> list[str]:
    """On a rank: what went wrong when each scheme loaded each checkpoint."""
    whole, wrong = expected(width), []
    for name, scheme in schemes(world_size, width).items():
        gpt, moments = built(scheme, width)
        assert {key for key, _ in shards(gpt, moments)} == whole.keys()
        for other in saved:
            for _, tensor in shards(gpt, moments):
                tensor.to_local().fill_(float("nan"))
            store.load(folder_of(folder / other, 1), gpt, moments)
            wrong += [f"{other} -> {name}: {key}" for key, tensor in shards(gpt, moments)
                      if not torch.equal(tensor.to_local(), shard_of(whole[key], tensor))]  # fmt: skip
    return wrong


@pytest.mark.parametrize("width", WIDTHS)
def test_any_scheme_loads_what_any_other_saved(tmp_path, width):
    for world_size in SCHEMES:
        run_distributed(save_all, world_size, tmp_path, width, world_size)
    saved = [name for world_size in SCHEMES for name in schemes(world_size, width)]
    for world_size in SCHEMES:
        for wrong in run_distributed(load_all, world_size, tmp_path, width, world_size, saved):
            assert not wrong
