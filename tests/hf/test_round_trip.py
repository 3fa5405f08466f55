"""Checkpoints that transformers wrote have its logits on every mesh, and go back to it bit for bit."""

import hashlib
from pathlib import Path

import pytest
import torch
from checkpoints import relist
from distributed import run_distributed
from hf_models import CASES, ids, make, reference
from safetensors.torch import load_file

from megatsp.axes import Axes
from megatsp.checkpoint import paths, state, store
from megatsp.compose import to_yaml
from megatsp.hf.checkpoint import open_checkpoint
from megatsp.hf.export import export
from megatsp.hf.kept import kept_files
from megatsp.hf.load import load_weights
from megatsp.hf.logits import logits
from megatsp.hf.verify import verify_on_mesh
from megatsp.model.parallelize import build_model
from megatsp.schema import Config, ParallelConfig, TrainerConfig
from megatsp.validate import validate


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folder, transformers' logits and its greedy text of each case."""
    found = {}
    for case in CASES:
        folder = tmp_path_factory.mktemp(case.name)
        make(case, folder)
        found[case.name] = folder, *reference(folder)
    return found


def config_for(folder: Path, world_size: int, keys: dict) -> Config:
    parallel = ParallelConfig(**{"dp_shard": 1, **keys})
    return validate(Config(model=open_checkpoint(str(folder)).model, parallel=parallel), world_size)


def rank_errors(cases: list[tuple[Path, torch.Tensor, dict, Path]]) -> list[float]:
    """On a rank: each case's largest difference from transformers, over the largest logit; saves it."""
    errors = []
    for folder, expected, keys, run in cases:
        config = config_for(folder, torch.distributed.get_world_size(), keys)
        axes = Axes.build(config.parallel, torch.device("cpu"))
        gpt = build_model(config, axes)
        load_weights(open_checkpoint(str(folder)), gpt)
        found = logits(gpt, axes, ids())
        errors.append(((found - expected).abs().max() / expected.abs().max()).item())
        store.save(run, state.RunState(), gpt, {}, {})
    return errors


def check(folders, tmp_path, world_size, meshes):
    """Each case on one of the meshes, in turn, and the first case on all of them."""
    names = list(folders)
    jobs = [(names[0], mesh) for mesh in meshes]
    jobs += [(name, meshes[i % len(meshes)]) for i, name in enumerate(names)]
    cases = [(*folders[name][:2], mesh, tmp_path / str(i)) for i, (name, mesh) in enumerate(jobs)]
    for errors in run_distributed(rank_errors, world_size, cases):
        over = {f"{name} {mesh}": e for (name, mesh), e in zip(jobs, errors, strict=True) if not e <= 1e-5}
        assert not over
    for (name, mesh), (folder, _, _, run) in zip(jobs, cases, strict=True):
        saved = paths.folder_of(run, 0)
        config = config_for(folder, world_size, mesh)
        for path, content in {
            **kept_files(open_checkpoint(str(folder))),
            "config.yaml": to_yaml(config),
        }.items():
            (saved / path).parent.mkdir(exist_ok=True)
            (saved / path).write_bytes(content.encode() if isinstance(content, str) else content)
        export(relist(saved), run / "hf", verify=False)
        assert same_bits(folder, run / "hf"), (name, mesh)
        assert (folder / "config.json").read_text() == (run / "hf" / "config.json").read_text()


def same_bits(one: Path, other: Path) -> bool:
    a, b = (
        {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}
        for folder in (one, other)
    )
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("tsp", [1, 2, 4, 8])
def test_logits_and_bits(folders, tmp_path, tsp):
    check(folders, tmp_path, tsp, [dict(tsp=tsp, tsp_layout="hidden"), dict(tsp=tsp, tsp_layout="owner")])


def test_on_other_meshes(folders, tmp_path):
    some = {name: folders[name] for name in ("llama_tied", "qwen3_linear", "qwen2_bf16")}
    meshes = [dict(tsp=2, dp_shard=2), dict(cp=2, tsp=2), dict(tp=2, dp_replicate=2), dict(tp=2, cp=2)]
    check(some, tmp_path, 4, meshes)


def test_transformers_goes_on_with_an_export(folders, tmp_path):
    """The same greedy tokens, whatever the number of files."""
    for name, (folder, expected, text) in folders.items():
        config = Config(model=open_checkpoint(str(folder)).model)
        saved = as_checkpoint(tmp_path / name, folder, config)
        export(saved, tmp_path / name / "hf", max_shard_bytes=30_000, verify=False)
        assert (tmp_path / name / "hf" / "model.safetensors.index.json").is_file()
        found, continued = reference(tmp_path / name / "hf")
        assert torch.equal(found, expected) and torch.equal(continued, text), name


def as_checkpoint(run: Path, folder: Path, config: Config) -> Path:
    """One of our checkpoints with these weights, as `megatsp convert import` makes it without a tokenizer."""
    from megatsp.hf.output import write_weights
    from megatsp.hf.source import HFSource

    saved, opened = paths.folder_of(run, 0), open_checkpoint(str(folder))
    saved.mkdir(parents=True)
    source, most = HFSource(opened), 10**9
    write_weights(saved, source, opened.dtypes, most, lambda i, n: f"shard-{i}.safetensors", {}, hashlib.md5)
    for path, content in kept_files(opened).items():
        (saved / path).parent.mkdir(exist_ok=True)
        (saved / path).write_bytes(content)
    (saved / "config.yaml").write_text(to_yaml(config))
    (saved / "state.json").write_bytes(state.state_to_json(state.RunState()))
    return relist(saved)


def rank_reports(folders: list[Path], keys: dict, dtype: str) -> list[tuple]:
    """On a rank: the check of each, and of weights of which one number is wrong."""
    found = []
    for folder in folders:
        opened = open_checkpoint(str(folder))
        config = Config(
            model=opened.model,
            parallel=ParallelConfig(**{"dp_shard": 1, **keys}),
            trainer=TrainerConfig(dtype=dtype),
        )
        config = validate(config, torch.distributed.get_world_size())
        axes = Axes.build(config.parallel, torch.device("cpu"))
        gpt = build_model(config, axes)
        load_weights(opened, gpt)
        report = verify_on_mesh(gpt, axes, opened, dtype)
        with torch.no_grad():
            gpt.layer(1).mlp.down_proj.weight.to_local().zero_()
        try:
            verify_on_mesh(gpt, axes, opened, dtype)
        except ValueError as error:
            found.append((report, str(error)))
    return found


@pytest.mark.parametrize(("dtype", "mesh"), [("bf16", dict(tsp=2)), ("fp32", dict(dp_shard=2))])
def test_the_check_on_a_mesh(folders, dtype, mesh):
    names = ("llama3_mha", "olmo2", "smollm3") if dtype == "bf16" else ("qwen2_yarn",)
    results = run_distributed(rank_reports, 2, [folders[name][0] for name in names], mesh, dtype)
    assert results[0] == results[1]
    assert len(results[0]) == len(names)
    for report, failure in results[0]:
        assert "the same" in str(report) and '"passed": true' in report.to_json()
        assert report.tokens == 128 and report.top1_agreement > 0.9
        assert (report.transformers_bf16 is None) == (dtype == "fp32")
        assert "the check of the conversion failed" in failure and "max_difference" in failure
        assert "--no-verify" in failure
