"""The one place where settings are held against each other and the automatic ones are chosen.

Three passes, all reported together: each key against its own choices and interval (the schema says
them), the keys against each other, then the numbers that were left to choose.
"""

import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

from megatsp.data.source_list import read_sources
from megatsp.launch_rules import launch_errors
from megatsp.nearest import did_you_mean
from megatsp.parallel_rules import (
    bucket_errors,
    choose_buckets,
    divisors,
    filled_in,
    listed,
    nearest_multiples,
    resolve_axes,
    split_errors,
)
from megatsp.schema import AXES, MATRICES, Config, FinetuneConfig, ModelConfig, RotaryScaling

# Names of files that `megatsp preprocess` reads.
_RAW = re.compile(r"\.(jsonl|json|ndjson|txt|parquet)(\.gz|\.zst)?$")


def validate(config: Config, world_size: int) -> Config:
    """The configuration with its automatic values filled in, once every rule holds.

    Filled in: the axis of `parallel` that is -1, its three bucket counts, scheduler.lr_decay_iters.

    Args:
        world_size: ranks of the whole job: see megatsp/cluster/start.py.

    Raises:
        ValueError: lists every violated rule: what was given, what is allowed, how to fix it.
    """
    errors = list(_key_errors(config))
    # A count that is out of its interval is reported above; as 1 it cannot also break a rule below.
    counts = _counts_as_positive(config)
    errors += _rule_errors(counts)
    errors += _profile_errors(counts, max(1, world_size))
    parallel, mesh_error = resolve_axes(counts, max(1, world_size))
    meshed = replace(counts, parallel=parallel)
    errors += [mesh_error] if mesh_error else _batch_errors(meshed)
    errors += split_errors(meshed)
    filled = _fill(meshed)
    errors += bucket_errors(filled)
    if errors:
        count = "1 setting" if len(errors) == 1 else f"{len(errors)} settings"
        origins = filled_in(config.parallel, parallel, errors)
        raise ValueError("\n  - ".join([f"cannot run with {count}:", *errors, *origins]))
    return filled


def dp_size(config: Config) -> int:
    """Data-parallel ranks of a validated configuration: those that read different samples."""
    return config.parallel.dp_replicate * config.parallel.dp_shard


def spoken(interval: str) -> str:
    """An interval as messages say it: "[1, inf)" is ">= 1", "(0, inf)" is "> 0"."""
    low, high = interval[1:-1].split(", ")
    return f"in {interval}" if high != "inf" else f">= {low}" if interval[0] == "[" else f"> {low}"


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted path, value, dataclass field) of every key."""
    for item in fields(node):
        value = getattr(node, item.name)
        if is_dataclass(value):
            yield from _leaves(value, f"{path}{item.name}.")
        else:
            yield f"{path}{item.name}", value, item


def _in_interval(value: float, interval: str) -> bool:
    """Whether `value` lies in an interval written as "[0, 1)"."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    return above and (value <= high if interval[-1] == "]" else value < high)


def _key_errors(config: Config) -> Iterator[str]:
    for path, value, item in _leaves(config):
        choices, interval = item.metadata["choices"], item.metadata["within"]
        if choices and value not in choices:
            yield f"{path}={value}: choose one of {', '.join(choices)}{did_you_mean(value, choices)}"
        if interval and not _in_interval(value, interval):
            yield f"{path}={value}: must be {spoken(interval)}"


def _counts_as_positive(node: Any) -> Any:
    """A copy in which an integer below its interval "[1, ..." is 1."""
    changes: dict[str, Any] = {}
    for item in fields(node):
        value = getattr(node, item.name)
        if is_dataclass(value):
            changes[item.name] = _counts_as_positive(value)
        elif type(value) is int and item.metadata["within"].startswith("[1") and value < 1:
            changes[item.name] = 1
    return replace(node, **changes)


def _rule_errors(config: Config) -> Iterator[str]:
    """Rules between keys that need neither the world size nor an automatic value."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*", config.name):
        yield f"name={config.name!r}: one folder's name: letters, digits and _ first, then also . + -"
    for path in ("output_dir", "data.path", "data.tokenizer"):
        given = attrgetter(path)(config)
        if not given or (isinstance(given, list) and not all(given)):
            yield f"{path} is empty: give a path"
    yield from _data_errors(config)
    yield from _model_errors(config)
    yield from _finetune_errors(config)
    yield from _adapter_errors(config)
    yield from _scheduler_errors(config)
    yield from _failure_errors(config)
    yield from launch_errors(config.launch)
    yield from _logging_errors(config)

    p = config.parallel
    if p.pp != 1:
        yield f"parallel.pp={p.pp}: only 1 in this version; shard with parallel.tsp"
    for axis in AXES:
        if getattr(p, axis) == 0:
            yield f"parallel.{axis}=0: give a number of ranks, or -1 for what the other axes leave"


def _profile_errors(config: Config, world_size: int) -> Iterator[str]:
    """The recorded iterations are a range of the run's, and the ranks are among its own."""
    logging, train_iters = config.logging, config.trainer.train_iters
    start, end = logging.profile_step_start, logging.profile_step_end
    if end and not start:
        yield f"logging.profile_step_end={end}: nothing is recorded without logging.profile_step_start"
    if start and not start <= end <= train_iters:
        yield (
            f"logging.profile_step_end={end}: must be from profile_step_start={start} to "
            f"trainer.train_iters={train_iters}"
        )
    if start and not logging.profile_ranks:
        yield "logging.profile_ranks=[]: name a rank, or set profile_step_start and profile_step_end to 0"
    if wrong := [rank for rank in logging.profile_ranks if not 0 <= rank < world_size]:
        yield f"logging.profile_ranks: {wrong[0]} is none of the ranks 0 to {world_size - 1}"


def _data_errors(config: Config) -> Iterator[str]:
    d = config.data
    for name in ("path", "valid_path", "test_path"):
        try:
            _, sources = read_sources(getattr(d, name) or ["held out"])
        except ValueError as error:
            yield str(error)
            continue
        for raw in (source for source in sources if _is_raw(source)):
            chat = " --format chat" if config.finetune.hf else ""
            end, key = ("", "chat") if chat else (" --append-eod", "text")
            prefix = _RAW.sub("", raw)
            plain = " (plain texts: --append-eod in place of --format chat)" if chat else ""
            yield (
                f"data.{name}={raw} is text, not tokens: first run `megatsp preprocess{chat} --tokenizer "
                f"{d.tokenizer}{end} --input {raw} --output-prefix {prefix}`, then give "
                f"{prefix}_{key}_document{plain}"
            )
    if d.valid_fraction < 1 and d.test_fraction < 1 and d.valid_fraction + d.test_fraction >= 1:
        yield f"data.test_fraction={d.test_fraction}: with valid_fraction={d.valid_fraction} nothing is left"
    if d.packing == "concat" and d.long_documents != "split":
        yield (
            f"data.long_documents={d.long_documents}: data.packing=concat cuts one stream and looks at no "
            "document's length; use packing greedy, best_fit or pad"
        )


def _is_raw(source: str) -> bool:
    """Whether a source is a file of text; a prefix may be called so too."""
    return bool(_RAW.search(source)) and not Path(f"{source}.idx").exists()


def _finetune_errors(config: Config) -> Iterator[str]:
    f, plain = config.finetune, FinetuneConfig()
    if unknown := [name for name in f.lora_targets if name not in MATRICES]:
        near = did_you_mean(unknown[0], MATRICES)
        yield f"finetune.lora_targets: {unknown[0]}{near}; choose of {', '.join(MATRICES)}"
    if not f.lora_targets or len({*f.lora_targets}) < len(f.lora_targets):
        yield f"finetune.lora_targets=[{','.join(f.lora_targets)}]: name each matrix with adapters once"
    for key in ("lora_alpha", "lora_targets", "lora_merge"):
        if not f.lora_rank and getattr(f, key) != getattr(plain, key):
            yield f"finetune.{key}: only adapters have it; set finetune.lora_rank above 0, or leave it out"
    if f.export_dtype != "auto" and f.lora_rank and not f.lora_merge:
        yield f"finetune.export_dtype={f.export_dtype}: adapters alone are fp32; set finetune.lora_merge=true"
    if f.export == "none" and (f.lora_merge or f.export_dtype != "auto"):
        yield "finetune.export=none: nothing is exported; leave lora_merge and export_dtype out"
    if f.early_stopping:
        fix = "set finetune.early_stopping=0, or"
        if not config.data.valid_path and not config.data.valid_fraction:
            yield f"finetune.early_stopping={f.early_stopping}: {fix} data.valid_fraction or data.valid_path"
        if not config.trainer.eval_interval:
            yield f"finetune.early_stopping={f.early_stopping}: {fix} trainer.eval_interval"


def _model_errors(config: Config) -> Iterator[str]:
    m, scaling = config.model, config.model.rotary_scaling
    heads, groups = m.num_attention_heads, m.num_query_groups
    if heads % groups:
        allowed = listed(divisors(heads))
        yield f"model.num_query_groups={groups}: must divide num_attention_heads={heads}; use {allowed}"
    if m.kv_channels % 2:
        nearest = nearest_multiples(m.kv_channels, 2)
        yield f"model.kv_channels={m.kv_channels}: rotary embedding turns pairs; use {nearest}"
    if scaling.type == "none" and scaling.factor > 1:
        factor = f"model.rotary_scaling.factor={scaling.factor}"
        yield f"{factor}: needs rotary_scaling.type linear, llama3 or yarn"
    if scaling.type == "llama3" and not scaling.low_freq_factor < scaling.high_freq_factor:
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        yield f"model.rotary_scaling.low_freq_factor={low}: must be below high_freq_factor={high}"
    yield from _yarn_errors(config.model)
    if m.qk_layernorm_width == "all" and not m.qk_layernorm:
        yield "model.qk_layernorm_width=all: needs model.qk_layernorm=true; or use width head"


def _adapter_errors(config: Config) -> Iterator[str]:
    """An adapter's rank is below both sides of its matrix, or it would be no smaller than that."""
    rank = config.finetune.lora_rank
    for name, (rows, columns) in _matrix_shapes(config.model).items():
        if name in config.finetune.lora_targets and rank > min(rows, columns):
            yield f"finetune.lora_rank={rank}: {name} is {rows} x {columns}; use at most {min(rows, columns)}"


def _matrix_shapes(m: ModelConfig) -> dict[str, tuple[int, int]]:
    """[out, in] of a layer's matrices, by name."""
    query, kv = m.num_attention_heads * m.kv_channels, m.num_query_groups * m.kv_channels
    h, ffn = m.hidden_size, m.ffn_hidden_size
    shapes = [(query, h), (kv, h), (kv, h), (h, query), (ffn, h), (ffn, h), (h, ffn)]
    return dict(zip(MATRICES, shapes, strict=True))


def _yarn_errors(model: ModelConfig) -> Iterator[str]:
    scaling, unset = model.rotary_scaling, RotaryScaling()
    if scaling.type != "yarn":
        for name in ("beta_fast", "beta_slow", "attention_factor"):
            if (value := getattr(scaling, name)) != getattr(unset, name):
                yield f"model.rotary_scaling.{name}={value}: only rotary_scaling.type=yarn reads it"
        return
    if scaling.factor == 1:
        yield "model.rotary_scaling.factor=1.0: rotary_scaling.type=yarn needs a factor above 1; or type none"
    if scaling.beta_slow > scaling.beta_fast:
        slow, fast = scaling.beta_slow, scaling.beta_fast
        yield f"model.rotary_scaling.beta_slow={slow}: must not exceed beta_fast={fast}"
    if model.rotary_base <= 1:
        yield f"model.rotary_base={model.rotary_base}: rotary_scaling.type=yarn needs a base above 1"


def _scheduler_errors(config: Config) -> Iterator[str]:
    s, train_iters = config.scheduler, config.trainer.train_iters
    warmup, end, wsd = s.lr_warmup_iters, s.lr_decay_iters or train_iters, s.lr_wsd_decay_iters
    if s.min_lr > config.optimizer.lr:
        yield f"scheduler.min_lr={s.min_lr}: must not exceed optimizer.lr={config.optimizer.lr}"
    if warmup >= train_iters:
        yield f"scheduler.lr_warmup_iters={warmup}: must be below trainer.train_iters={train_iters}"
    elif warmup >= end:
        yield f"scheduler.lr_decay_iters={end}: must be above scheduler.lr_warmup_iters={warmup}, or 0"
    elif s.lr_decay_style == "WSD" and wsd > 0 and warmup + wsd > end:
        yield f"scheduler.lr_wsd_decay_iters={wsd}: at most {end - warmup} iterations follow the warm-up"
    if s.lr_decay_style == "WSD" and wsd == 0:
        yield "scheduler.lr_wsd_decay_iters=0: lr_decay_style=WSD needs the length of its final decay"
    if s.lr_decay_style != "WSD" and wsd > 0:
        yield f"scheduler.lr_wsd_decay_iters={wsd}: only lr_decay_style=WSD reads it; set 0"


def _failure_errors(config: Config) -> Iterator[str]:
    """What becomes of bad steps, leaps, old checkpoints and bad nodes, held against each other."""
    t, c = config.trainer, config.checkpoint
    for name in ("on_bad_steps", "on_spike"):
        if getattr(t, name) == "rollback" and not t.max_rollbacks:
            yield f"trainer.max_rollbacks=0: trainer.{name}=rollback needs at least 1, or choose another"
    if t.on_spike != "warn" and not t.spike_deviations:
        yield f"trainer.on_spike={t.on_spike}: nothing is a spike with spike_deviations=0; give deviations"
    if t.hang_timeout_s >= config.launch.timeout_s:
        yield (
            f"trainer.hang_timeout_s={t.hang_timeout_s:g}: must be below launch.timeout_s="
            f"{config.launch.timeout_s}, or that ends a hang first, without stacks; or 0"
        )
    if c.keep_every and not c.keep_last:
        yield f"checkpoint.keep_every={c.keep_every}: all are kept with keep_last=0; set keep_last, or 0 here"


def _logging_errors(config: Config) -> Iterator[str]:
    """Samples have something to continue and room for it; artifacts are of something that is exported."""
    logging, length = config.logging, config.trainer.seq_length
    if logging.sample_interval and not logging.sample_prompts:
        yield "logging.sample_prompts=[]: name a text to continue, or set logging.sample_interval=0"
    if logging.sample_interval and logging.sample_tokens >= length:
        yield f"logging.sample_tokens={logging.sample_tokens}: must be below trainer.seq_length={length}"
    if any("\ud800" <= c <= "\udfff" for prompt in logging.sample_prompts for c in prompt):
        yield "logging.sample_prompts: one is not valid UTF-8"
    if logging.wandb_artifacts and (not config.finetune.hf or config.finetune.export == "none"):
        yield (
            "logging.wandb_artifacts=true: only `megatsp sft` exports a model, unless finetune.export=none; "
            "set it to false"
        )
    if logging.wandb_artifacts and logging.wandb == "disabled":
        yield "logging.wandb_artifacts=true: logging.wandb=disabled gives W&B nothing; set one of them"


def _fill(config: Config) -> Config:
    """`config` with the automatic values chosen that no other rule needs."""
    s = config.scheduler
    scheduler = replace(s, lr_decay_iters=s.lr_decay_iters or config.trainer.train_iters)
    return replace(config, scheduler=scheduler, parallel=choose_buckets(config))


def _batch_errors(config: Config) -> Iterator[str]:
    """The global batch is whole micro-batches of every data-parallel rank."""
    t, dp = config.trainer, dp_size(config)
    if t.global_batch_size % (t.micro_batch_size * dp):
        given = f"trainer.global_batch_size={t.global_batch_size}"
        step = f"micro_batch_size={t.micro_batch_size} x {dp} data-parallel ranks"
        nearest = nearest_multiples(t.global_batch_size, t.micro_batch_size * dp)
        yield f"{given}: {step} must divide it; use {nearest}"
