"""Adapters between our checkpoints and PEFT: the same logits, the same merged weights, clear refusals."""

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import relist
from distributed import run_distributed
from hf_models import CASES, ids, make
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatsp.axes import Axes
from megatsp.checkpoint import store
from megatsp.checkpoint.state import RunState
from megatsp.compose import to_yaml
from megatsp.hf.adapter import Merged, export_merged, own_adapter, read_adapter, write_adapter
from megatsp.hf.checkpoint import open_checkpoint
from megatsp.hf.load import load_weights
from megatsp.hf.logits import logits
from megatsp.hf.source import HFSource
from megatsp.model.gpt import GPT
from megatsp.model.init import initial_slice
from megatsp.model.parallelize import build_model
from megatsp.schema import MATRICES, Config, FinetuneConfig, ParallelConfig
from megatsp.training.optimizer import AdamW

# The base, what is adapted, and the mesh that saves: an odd mix, tied and biased models among them.
SAVED: dict[str, tuple[FinetuneConfig, dict]] = {
    "llama_tied": (FinetuneConfig(lora_rank=3, lora_alpha=5.0), dict(tsp=2)),
    "qwen2_yarn": (
        FinetuneConfig(lora_rank=4, lora_alpha=16.0, lora_targets=["v_proj", "q_proj"]),
        dict(tsp=2, tsp_layout="owner"),
    ),
    "qwen3_linear": (
        FinetuneConfig(lora_rank=2, lora_alpha=2.5, lora_targets=["o_proj", "down_proj", "up_proj"]),
        dict(dp_shard=2),
    ),
    "olmo2": (FinetuneConfig(lora_rank=5, lora_alpha=7.0), dict(tsp=2)),
}


@torch.no_grad()
def randomise(gpt: GPT) -> None:
    """Both sides of every adapter, the same on every mesh."""
    for name, parameter in gpt.named_parameters():
        if ".lora_" in name:
            rows, columns = parameter.shape
            whole = initial_slice(3, name, (0, rows), (0, columns), columns, 0.2)
            fresh = torch.distributed.tensor.distribute_tensor(
                whole, parameter.device_mesh, parameter.placements, src_data_rank=None
            )
            parameter.to_local().copy_(fresh.to_local())


def rank_save(jobs: list[tuple[Path, Path, FinetuneConfig, dict]]) -> list[Tensor]:
    """On a rank: saves a checkpoint of each base with adapters; returns their logits."""
    found = []
    for base, run, finetune, parallel in jobs:
        source = open_checkpoint(str(base))
        mesh = ParallelConfig(
            **{"dp_shard": 1, "attention_buckets": 1, "mlp_buckets": 2, "head_buckets": 1, **parallel}
        )
        config = Config(model=source.model, parallel=mesh, finetune=replace(finetune, hf=str(base)))
        axes = Axes.build(config.parallel, torch.device("cpu"))
        gpt = build_model(config, axes)
        load_weights(source, gpt)
        randomise(gpt)
        extra = {"config.yaml": to_yaml(config).encode()}
        state = RunState(iteration=1, base_fingerprint=source.fingerprint)
        store.save(run, state, gpt, AdamW(gpt, config.optimizer).tensors(), extra)
        found.append(logits(gpt, axes, ids()))
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, tuple[Path, Path, Tensor]]:
    """Of each case its base, the checkpoint of its adapters, and our logits."""
    folder, jobs = tmp_path_factory.mktemp("adapters"), []
    for name, (finetune, parallel) in SAVED.items():
        make(next(case for case in CASES if case.name == name), folder / name)
        (folder / f"{name}-run").mkdir()
        jobs.append((folder / name, folder / f"{name}-run", finetune, parallel))
    results = run_distributed(rank_save, 2, jobs)[0]
    return {
        name: (base, run / "iter_0000001", found)
        for name, (base, run, *_), found in zip(SAVED, jobs, results, strict=True)
    }


def peft_of(base: Path, adapter: Path) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers' deprecated names, in peft
        return PeftModel.from_pretrained(model, adapter).eval()


@pytest.mark.parametrize("name", SAVED)
@torch.no_grad()
def test_peft_loads_what_we_write_and_merges_as_we_do(saved, tmp_path, name):
    base, run, ours = saved[name]
    write_adapter(run, tmp_path / "adapter", str(base))
    model = peft_of(base, tmp_path / "adapter")
    theirs = model(ids()).logits
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()

    config = open_checkpoint(str(base))
    adapter = read_adapter(tmp_path / "adapter", config.model)
    own, _ = own_adapter(run)
    assert adapter.scale == own.scale and len(own.scale) == config.model.num_layers * len(
        SAVED[name][0].lora_targets
    )
    merged = Merged(HFSource(config), adapter)
    wanted = model.merge_and_unload().state_dict()
    for parameter in merged.shapes:
        torch.testing.assert_close(merged.read(parameter).float(), wanted[parameter], rtol=1e-6, atol=1e-7)


def test_the_checkpoint_holds_adapters_and_their_moments_alone(saved):
    for name, (_, run, _) in saved.items():
        names = {tensor for path in run.glob("*.safetensors") for tensor in load_file(path)}
        weights = {tensor for tensor in names if not tensor.startswith("optimizer.")}
        layers = 2 * len(SAVED[name][0].lora_targets)
        assert len(weights) == 2 * layers and all(".lora_" in tensor for tensor in weights)
        moments = {f"optimizer.{m}.{w}" for m in ("exp_avg", "exp_avg_sq") for w in weights}
        assert names == weights | moments


@torch.no_grad()
def test_a_merged_export_is_verified_and_gives_our_logits(saved, tmp_path):
    from transformers import AutoModelForCausalLM

    _, run, ours = saved["qwen3_linear"]
    report = export_merged(run, tmp_path / "hf", verify=True)
    assert report is not None
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    assert (ours - model(ids()).logits).abs().max() <= 1e-5 * ours.abs().max()


def test_a_base_that_moved_is_named(saved, tmp_path):
    base, run, _ = saved["qwen3_linear"]
    moved = base.rename(tmp_path / "moved")
    try:
        with pytest.raises(ValueError, match=f"no checkpoint at {base}"):
            export_merged(run, tmp_path / "hf", verify=False)
        export_merged(run, tmp_path / "hf", verify=False, base=str(moved))
    finally:
        moved.rename(base)
    assert (tmp_path / "hf" / "config.json").is_file()
    with pytest.raises(ValueError, match="is not what the run tunes: its fingerprint is"):
        export_merged(run, tmp_path / "other", verify=False, base=str(saved["llama_tied"][0]))


@torch.no_grad()
def test_patterns_and_rslora_are_pefts(saved, tmp_path):
    """An adapter that PEFT made, with ranks and scales of its own for some matrices."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = saved["llama_tied"][0]
    settings = LoraConfig(
        r=2, lora_alpha=3, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", use_rslora=True,
        rank_pattern={"q_proj": 4}, alpha_pattern={r"layers\.1\.mlp\.down_proj": 8},
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), settings)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
        model.save_pretrained(tmp_path)
    source = open_checkpoint(str(base))
    merged = Merged(HFSource(source), read_adapter(tmp_path, source.model))
    wanted = model.merge_and_unload().state_dict()
    for name in merged.shapes:
        torch.testing.assert_close(merged.read(name), wanted[name], rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def written(saved, tmp_path_factory) -> tuple[Path, Any]:
    base, run, _ = saved["llama_tied"]
    folder = tmp_path_factory.mktemp("written") / "adapter"
    write_adapter(run, folder, str(base))
    return folder, open_checkpoint(str(base)).model


def options(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def tensors(folder: Path, change: Any) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


A, B = (f"base_model.model.model.layers.0.mlp.up_proj.lora_{side}.weight" for side in "AB")
ABSENT = "base_model.model.model.layers.7.mlp.up_proj.lora_A.weight"
EXPERT = "base_model.model.model.layers.0.mlp.up_project.lora_A.weight"
DAMAGES = {
    "no adapter_config.json": lambda f: (f / "adapter_config.json").unlink(),
    "has no adapter_model.safetensors$": lambda f: (f / "adapter_model.safetensors").unlink(),
    "adapter_model.bin: pickled tensors can run code": lambda f: (f / "adapter_model.safetensors").rename(
        f / "adapter_model.bin"
    ),
    "use_dora=True: it also scales every row": lambda f: options(f, use_dora=True),
    "bias='lora_only': it also trains the base's biases": lambda f: options(f, bias="lora_only"),
    r"modules_to_save=\['lm_head'\]": lambda f: options(f, modules_to_save=["lm_head"]),
    "init_lora_weights='pissa': it changes the base's": lambda f: options(f, init_lora_weights="pissa"),
    "peft_type='IA3': we compute LoRA alone": lambda f: options(f, peft_type="IA3"),
    "use_doora=True: no option that we know; did you mean use_dora": lambda f: options(f, use_doora=True),
    "the model has no qproj; did you mean .*q_proj": lambda f: options(f, target_modules=["qproj"]),
    "has an adapter, but is not among target_modules": lambda f: options(f, target_modules=["q_proj"]),
    "has rank 3, by adapter_config.json 8": lambda f: options(f, r=8),
    "lora_alpha=None in adapter_config.json": lambda f: options(f, lora_alpha=None),
    r"'\(' is no pattern": lambda f: options(f, alpha_pattern={"(": 3}),
    "one of A and B of model.layers.0.mlp.up_proj": lambda f: tensors(
        f, lambda t: {name: tensor for name, tensor in t.items() if name != A}
    ),
    "1 of 14 target modules have no adapter in the file, such as .*0.mlp.up_proj": lambda f: tensors(
        f, lambda t: {name: tensor for name, tensor in t.items() if name not in (A, B)}
    ),
    "of model.layers.7.mlp.up_proj, which the model has not; did you mean": lambda f: tensors(
        f, lambda t: {**t, ABSENT: t[A].clone()}
    ),
    "of model.layers.0.mlp.up_project, which the model has not; did you mean model.layers.0.mlp.up_proj":
        lambda f: tensors(f, lambda t: {**t, EXPERT: t[A].clone()}),
    r"A and B of model.layers.0.mlp.up_proj are \(3, 47\)": lambda f: tensors(
        f, lambda t: {**t, A: t[A][:, 1:].clone()}
    ),
    "we know A and B of matrices alone": lambda f: tensors(
        f, lambda t: {**t, A.replace("lora_A", "lora_magnitude_vector"): t[A][0].clone()}
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", DAMAGES)
def test_what_cannot_be_computed_is_refused(written, tmp_path, message):
    shutil.copytree(written[0], tmp_path / "adapter")
    DAMAGES[message](tmp_path / "adapter")
    with pytest.raises(ValueError, match=message):
        read_adapter(tmp_path / "adapter", written[1])


def test_a_run_without_adapters_has_none_to_write(saved, tmp_path):
    run = tmp_path / "iter_0000001"
    shutil.copytree(saved["llama_tied"][1], run)
    (run / "config.yaml").write_text(to_yaml(Config()))
    relist(run)
    with pytest.raises(ValueError, match="has no adapters: all weights were trained"):
        write_adapter(run, tmp_path / "out", "base")
    with pytest.raises(ValueError, match="there and not empty"):
        write_adapter(saved["llama_tied"][1], tmp_path, "base")


def test_the_written_configuration_names_what_is_adapted(written):
    config = json.loads((written[0] / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["bias"]) == (3, 5, "none")
    assert tuple(config["target_modules"]) == MATRICES
    stored = load_file(written[0] / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32} and len(stored) == 28
