"""Rules of the mesh: how many ranks each axis has, what they cut, into how many buckets.

Axes of unknown size are -1, automatic bucket counts 0; validate.py puts the rules together.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from megatsp.schema import AXES, Config, ModelConfig, ParallelConfig

# A bucket with fewer multiply-adds than this costs more to send off and wait for than its overlap and
# its memory are worth: measured on CPUs (docs/log.md). On a GPU the number would be larger.
MULTIPLY_ADDS = 2**30


def resolve_axes(config: Config, world_size: int) -> tuple[ParallelConfig, str]:
    """`config.parallel` with every axis at least 1, and what is wrong with the mesh ("" if nothing).

    One axis beside dp_shard may be -1 and takes what is left; dp_shard=-1 is then 1.
    """
    p = config.parallel
    sizes: dict[str, Any] = {axis: getattr(p, axis) or 1 for axis in AXES}
    left = [axis for axis in AXES if sizes[axis] == -1]
    if len(left) > 1 and "dp_shard" in left:
        left.remove("dp_shard")
    positive = replace(p, **{axis: max(1, n) for axis, n in sizes.items()})
    if len(left) > 1:
        wrong = " and ".join(f"parallel.{axis}=-1" for axis in left)
        return positive, f"{wrong}: only one axis can take what is left; give the others a number of ranks"
    product = math.prod(getattr(positive, axis) for axis in AXES)
    given = {axis: getattr(positive, axis) for axis in AXES if axis not in left}
    factors = [f"{axis} {n}" for axis, n in given.items() if n > 1] or ["every axis 1"]
    text = " x ".join(factors) + (f" = {product}" if len(factors) > 1 else "")
    start = f"start {product} ranks (alone: launch.nproc={product})"
    if not left and product != world_size:
        fix = f"{start} or set one axis to -1 to derive it"
        return positive, f"parallel: {text}, but {world_size} ranks; {fix}"
    if world_size % product:
        wrong = f"parallel: {text} does not divide the {world_size} ranks; {start}"
        return positive, wrong + _other_tsp(config, positive, world_size)
    return (replace(positive, **{left[0]: world_size // product}) if left else positive), ""


def filled_in(given: ParallelConfig, found: ParallelConfig, errors: Sequence[str]) -> Iterator[str]:
    """For each axis of those errors that nobody gave: where its size is from.

    given: with axes that are -1. found: the same by `resolve_axes`.
    """
    for axis in AXES:
        size = getattr(found, axis)
        if getattr(given, axis) == -1 and any(f"parallel.{axis}={size}" in error for error in errors):
            yield f"parallel.{axis}=-1 took the {size} ranks that the other axes leave"


def _other_tsp(config: Config, p: ParallelConfig, world_size: int) -> str:
    """Which parallel.tsp would do, if it is tsp that does not fit."""
    others = math.prod(getattr(p, axis) for axis in AXES if axis != "tsp")
    if p.tsp == 1 or world_size % others:
        return ""
    sizes = divisors(world_size // others)
    fitting = [n for n in sizes if not list(split_errors(replace(config, parallel=replace(p, tsp=n))))]
    return f", or use parallel.tsp={listed(fitting, ' or ')}" if fitting else ""


def split_errors(config: Config) -> Iterator[str]:
    """Rules between the model's sizes and the axes that cut them and the sequence."""
    m, p = config.model, config.parallel
    if p.tp > 1 and p.tsp > 1:
        yield f"parallel.tp={p.tp} with tsp={p.tsp}: both cut the weights; use one, and cp beside it"
    if p.tp > 1 and has_wide_norm(m):
        yield (
            f"parallel.tp={p.tp}: model.qk_layernorm_width=all normalises over heads that tp puts on "
            "different ranks; use tsp or cp"
        )
    if m.hidden_size % p.tsp:
        nearest = nearest_multiples(m.hidden_size, p.tsp)
        yield f"model.hidden_size={m.hidden_size}: parallel.tsp={p.tsp} must divide it; use {nearest}"
    if p.overlap == "fused" and p.tsp_layout != "hidden" and p.tsp > 1:
        yield f"parallel.overlap=fused: tsp_layout={p.tsp_layout} cannot; use hidden, or overlap=auto"
    yield from _sequence_errors(config)
    for name in ("num_attention_heads", "num_query_groups"):
        if (heads := getattr(m, name)) % p.tp:
            allowed = listed(divisors(heads), " or ")
            yield f"model.{name}={heads}: parallel.tp={p.tp} must divide it; use parallel.tp={allowed}"
    for name in ("ffn_hidden_size", "vocab_size"):
        if (columns := getattr(m, name)) and last_share(columns, p.tp) < 1:
            yield f"model.{name}={columns}: parallel.tp={p.tp} leaves a rank without any; use fewer"


def _sequence_errors(config: Config) -> Iterator[str]:
    """Zigzag makes two chunks a rank of cp x tsp, and tp cuts what they make together."""
    p, length = config.parallel, config.trainer.seq_length
    zigzag, every_rank = 2 * p.cp * p.tsp, p.cp * p.tsp * p.tp
    if length % math.lcm(zigzag, every_rank):
        axes = [f"parallel.{axis}" for axis in ("cp", "tsp") if getattr(p, axis) > 1] or ["parallel.tsp"]
        rule = f"2 * {' * '.join(axes)} = {zigzag}"
        if every_rank > zigzag or zigzag % every_rank:
            rule += f" and cp * tp = {every_rank}"
        nearest = nearest_multiples(length, math.lcm(zigzag, every_rank))
        yield f"trainer.seq_length={length}: {rule} must divide it; use {nearest}"


def choose_buckets(config: Config) -> ParallelConfig:
    """`config.parallel` with the bucket counts that are 0 chosen."""
    m, p = config.model, config.parallel
    groups = max(1, m.num_query_groups // p.tp)
    ffn, vocabulary = (max(1, last_share(n, p.tp)) for n in (m.ffn_hidden_size, m.vocab_size))
    heads = 2 * (m.num_attention_heads + m.num_query_groups) * m.kv_channels
    # A norm over all heads would walk several buckets twice (tsp/attention_wide_norm.py).
    most = 1 if has_wide_norm(m) else _buckets_worth(heads, config)
    attention = [n for n in divisors(groups) if n <= most and _whole_heads(groups // n, p)]
    mlp = p.tsp if p.tsp_layout == "owner" else min(_buckets_worth(3 * m.ffn_hidden_size, config), ffn)
    head = min(max(_buckets_worth(m.vocab_size, config), math.ceil(vocabulary / 8192)), vocabulary)
    return replace(
        p,
        attention_buckets=p.attention_buckets or max(attention, default=1),
        mlp_buckets=p.mlp_buckets or mlp,
        head_buckets=p.head_buckets or head,
    )


def has_wide_norm(model: ModelConfig) -> bool:
    """Whether q and k are normalised over all heads together."""
    return model.qk_layernorm and model.qk_layernorm_width == "all"


def _buckets_worth(columns: int, config: Config) -> int:
    """Buckets for a part with so many columns of h: D, but none with too little to compute.

    Two or more, if there is enough, so that one is on the wire while one is used.
    """
    p, t = config.parallel, config.trainer
    if p.tsp == 1:
        return 1
    tokens = t.micro_batch_size * t.seq_length // (p.cp * p.tsp)
    return max(1, min(max(2, p.tsp), tokens * columns * config.model.hidden_size // MULTIPLY_ADDS))


def bucket_errors(config: Config) -> Iterator[str]:
    """Rules of the bucket counts, all of them chosen."""
    m, p = config.model, config.parallel
    groups = max(1, m.num_query_groups // p.tp)
    if p.attention_buckets > 0:
        yield from _attention_bucket_errors(m.num_query_groups, groups, p)
    for part, name in (("mlp", "ffn_hidden_size"), ("head", "vocab_size")):
        count, columns = getattr(p, f"{part}_buckets"), getattr(m, name)
        if count > max(1, last_share(columns, p.tp)):
            share = f" / tp, {last_share(columns, p.tp)} on the last rank" if p.tp > 1 else ""
            yield f"parallel.{part}_buckets={count}: at most model.{name}={columns}{share}"
    if p.tsp_layout == "owner" and p.mlp_buckets % p.tsp:
        nearest = nearest_multiples(p.mlp_buckets, p.tsp)
        yield f"parallel.mlp_buckets={p.mlp_buckets}: owner needs a multiple of tsp; use {nearest}, or 0"


def _attention_bucket_errors(all_groups: int, groups: int, p: ParallelConfig) -> Iterator[str]:
    share = f"model.num_query_groups={all_groups}" + (f" / tp={p.tp}" if p.tp > 1 else "")
    if groups % p.attention_buckets:
        given, allowed = f"parallel.attention_buckets={p.attention_buckets}", listed(divisors(groups))
        yield f"{given}: must divide {share}; use one of {allowed}, or 0"
    elif not _whole_heads(groups // p.attention_buckets, p):
        share += f" / attention_buckets={p.attention_buckets}" if p.attention_buckets > 1 else ""
        yield (
            f"parallel.kv_exchange=ulysses: cp x tsp = {p.cp * p.tsp} ranks must divide the key/value heads "
            f"({share}); use fewer ranks, or kv_exchange=allgather or ring"
        )


def _whole_heads(groups: int, p: ParallelConfig) -> bool:
    """Whether Ulysses can give each rank whole heads of a bucket with so many key/value heads."""
    return p.kv_exchange != "ulysses" or groups % (p.cp * p.tsp) == 0


def last_share(length: int, ranks: int) -> int:
    """What DTensor's Shard, giving ceil(length / ranks) to each, leaves the last rank; it may be negative."""
    return length - (ranks - 1) * -(-length // ranks)


def nearest_multiples(value: int, step: int) -> str:
    """The multiples of `step` around `value`: "12 or 16", or only the upper one below the first."""
    low = value // step * step
    return f"{low} or {low + step}" if low else f"{step}"


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def listed(numbers: list[int], separator: str = ", ") -> str:
    return separator.join(map(str, numbers))
