"""Checkpoints that transformers wrote have its logits on every mesh."""

from pathlib import Path

import pytest
import torch
from distributed import run_distributed
from hf_models import CASES, ids, make, reference

from megatsp.axes import Axes
from megatsp.hf.checkpoint import open_checkpoint
from megatsp.hf.load import load_weights
from megatsp.hf.logits import logits
from megatsp.model.parallelize import build_model
from megatsp.schema import Config, ParallelConfig
from megatsp.validate import validate


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folder and transformers' logits of each case."""
    found = {}
    for case in CASES:
        folder = tmp_path_factory.mktemp(case.name)
        make(case, folder)
        found[case.name] = folder, reference(folder)[0]
    return found


def rank_errors(cases: list[tuple[Path, torch.Tensor, dict]]) -> list[float]:
    """On a rank: each case's largest difference from transformers, relative to the largest logit."""
    errors = []
    for folder, expected, parallel in cases:
        checkpoint = open_checkpoint(str(folder))
        config = Config(model=checkpoint.model, parallel=ParallelConfig(**{"dp_shard": 1, **parallel}))
        config = validate(config, torch.distributed.get_world_size())
        axes = Axes.build(config.parallel, torch.device("cpu"))
        gpt = build_model(config, axes)
        load_weights(checkpoint, gpt)
        found = logits(gpt, axes, ids())
        errors.append(((found - expected).abs().max() / expected.abs().max()).item())
    return errors


def check(folders, world_size, meshes):
    """Every case on one of the meshes, in turn, and the first case on all of them."""
    names = list(folders)
    jobs = [(names[0], mesh) for mesh in meshes]
    jobs += [(name, meshes[i % len(meshes)]) for i, name in enumerate(names)]
    cases = [(*folders[name], mesh) for name, mesh in jobs]
    for errors in run_distributed(rank_errors, world_size, cases):
        over = {f"{name} {mesh}": e for (name, mesh), e in zip(jobs, errors, strict=True) if not e <= 1e-5}
        assert not over


@pytest.mark.parametrize("tsp", [1, 2, 4, 8])
def test_logits_are_those_of_transformers(folders, tsp):
    check(folders, tsp, [dict(tsp=tsp, tsp_layout="hidden"), dict(tsp=tsp, tsp_layout="owner")])


def test_on_other_meshes(folders):
    """tp divides the heads of the first case alone."""
    some = {name: folders[name] for name in ("llama_tied", "qwen3_linear", "qwen2_bf16")}
    meshes = [dict(tsp=2, dp_shard=2), dict(cp=2, tsp=2), dict(tp=2, dp_replicate=2), dict(tp=2, cp=2)]
    check(some, 4, meshes)
