"""What `--dry-run` says of a configuration, computed without starting a rank."""

import math
from collections.abc import Iterator

from megatsp.model.gpt import adapter_shapes, count_parameters
from megatsp.schema import AXES, Config, ParallelConfig
from megatsp.training.folder import run_folder
from megatsp.training.memory import predict
from megatsp.validate import dp_size


def describe(config: Config, world_size: int) -> str:
    """Mesh, parameter count and predicted bytes per rank of a validated configuration."""
    parallel, trainer, model = config.parallel, config.trainer, config.model
    held = predict(config)
    tokens = trainer.seq_length // (parallel.cp * parallel.tsp * parallel.tp)
    accumulation = trainer.global_batch_size // (trainer.micro_batch_size * dp_size(config))
    buckets = (parallel.attention_buckets, parallel.mlp_buckets, parallel.head_buckets)
    rows = [
        ("world", f"{world_size} ranks"),
        ("mesh", " x ".join(f"{axis} {getattr(parallel, axis)}" for axis in AXES)),
        ("weights", _who_holds_what(parallel)),
        ("attention", _attention(parallel)),
        ("buckets", "attention {}, MLP {}, head {}".format(*buckets)),
        ("tokens per rank", f"{trainer.micro_batch_size} x {tokens:,}"),
        ("micro-batches", f"{accumulation} a step"),
        ("parameters", f"{count_parameters(model):,}"),
        *(_tuning(config) if config.finetune.hf else ()),
        ("bytes per rank", "(predicted)"),
        ("  weights", _bytes(held.weights)),
        ("  gradients", _bytes(held.gradients)),
        ("  optimizer", _bytes(held.optimizer)),
        ("  activations", f"{_bytes(held.saved_activations)} kept for the backward"),
        ("  gathered", f"{_bytes(held.gathered)} of weights at a time"),
        ("  sum", f"{_bytes(held.total)} and the working memory of one layer"),
    ]  # fmt: skip
    return "\n".join(f"{name:16} {text}" for name, text in rows)


def _tuning(config: Config) -> Iterator[tuple[str, str]]:
    """What `megatsp sft` begins with, changes and gives back."""
    f, model = config.finetune, config.model
    yield "tunes", f.hf
    if f.lora_rank:
        count = sum(math.prod(shape) for shape in adapter_shapes(model, f).values())
        targets = ", ".join(f.lora_targets)
        yield "trained", f"{count:,} in adapters of rank {f.lora_rank} on {targets}"
    else:
        yield "trained", f"all {count_parameters(model):,}"
    what = ["adapter (PEFT)"] * bool(f.lora_rank) + ["hf"] * (not f.lora_rank or f.lora_merge)
    folders = " and ".join(f"{run_folder(config)}/{name}" for name in what)
    yield "gives back", "nothing" if f.export == "none" else f"the {f.export} checkpoint, as {folders}"


def _who_holds_what(parallel: ParallelConfig) -> str:
    """By which axes a weight is cut."""
    cuts = []
    if parallel.tsp > 1:
        cuts.append(f"1/{parallel.tsp} over tsp ({parallel.tsp_layout})")
    if parallel.tp > 1:
        cuts.append(f"1/{parallel.tp} over tp")
    shards = parallel.dp_shard * (parallel.cp if parallel.fsdp_over_cp else 1)
    if shards > 1:
        cuts.append(f"1/{shards} by FSDP" + (" (dp_shard x cp)" if parallel.fsdp_over_cp else ""))
    return ", ".join(cuts) or "whole on every rank"


def _attention(parallel: ParallelConfig) -> str:
    ranks = parallel.cp * parallel.tsp
    return f"{parallel.kv_exchange} over {ranks} ranks" if ranks > 1 else "local"


def _bytes(count: int) -> str:
    return f"{count:,} ({count / 2**30:.2f} GiB)"
