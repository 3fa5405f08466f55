"""The transfers that a run will make, at their sizes, and the ranks that make each together.

Read off the validated configuration: of the streamed buckets the widest one, of FSDP one layer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatsp.axes import axis_sizes
from megatsp.cluster.mesh import coordinates
from megatsp.model.parallelize import parts
from megatsp.schema import AXES, Config, ParallelConfig
from megatsp.tsp.buckets import width

ITEM_BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Transfer:
    """One collective of the run.

    what: it carries. axes: of the mesh, that its group spans. operation: a method of `Comm`. elements: of
    the whole: what a gather gives, a reduction takes, a hop or a broadcast carries. dtype: fp32 or bf16.
    """

    what: str
    axes: tuple[str, ...]
    operation: str
    elements: int
    dtype: str

    @property
    def bytes(self) -> int:
        return self.elements * ITEM_BYTES[self.dtype]


def bus_bytes(operation: str, whole_bytes: int, ranks: int) -> float:
    """Bytes that a rank must at least receive (or send): what bus bandwidth divides by the time.

    (D-1)/D of the whole for gathers, scatters and all-to-all, twice that for an all-reduce, all of it for a
    hop, a broadcast or a reduction to one rank. Source: nccl-tests, doc/PERFORMANCE.md.
    """
    if operation in ("shift", "broadcast", "reduce"):
        return whole_bytes
    return (2 if operation == "all_reduce" else 1) * whole_bytes * (ranks - 1) / ranks


def transfers(config: Config) -> list[Transfer]:
    """All that groups of more than one rank make in a step, each kind once.

    config: validated. Weights go by collectives here also where kernels would move them (overlap=fused).
    """
    sizes = dict(zip(AXES, axis_sizes(config.parallel), strict=True))
    found = [*_weights(config), *_keys_and_values(config), *_tokens(config), *_data_parallel(config)]
    groups = ((transfer, _ranks(transfer.axes, sizes)) for transfer in found)
    return [transfer for transfer, ranks in groups if ranks > 1]


def groups(axes: Sequence[str], parallel: ParallelConfig) -> list[list[int]]:
    """The groups that span these axes, each as its ranks in order."""
    sizes = axis_sizes(parallel)
    world = 1
    for size in sizes:
        world *= size
    found: dict[tuple[int, ...], list[int]] = {}
    for rank in range(world):
        place = coordinates(rank, sizes)
        found.setdefault(tuple(place[axis] for axis in AXES if axis not in axes), []).append(rank)
    return list(found.values())


def _ranks(axes: Sequence[str], sizes: dict[str, int]) -> int:
    product = 1
    for axis in axes:
        product *= sizes[axis]
    return product


def _weights(config: Config) -> Iterator[Transfer]:
    """Of tsp: the widest bucket's columns, and their gradient in fp32."""
    p, dtype, h = config.parallel, config.trainer.dtype, config.model.hidden_size
    all_parts = parts(config.model, p)
    gathered = all_parts if p.tsp_layout == "hidden" else all_parts[2:]
    columns, label = max((width(b), part.label) for part in gathered for b in part.buckets)
    trained = not config.finetune.lora_rank
    yield Transfer(f"{label} weights", ("tsp",), "all_gather", columns * h, dtype)
    if trained:
        yield Transfer(f"{label} gradients", ("tsp",), "reduce_scatter", columns * h, "fp32")
    if p.tsp_layout == "owner":
        attention, mlp = (max(map(width, part.buckets)) * h for part in all_parts[:2])
        yield Transfer("attention weights", ("tsp",), "broadcast", attention, dtype)
        yield Transfer("mlp weights", ("tsp",), "shift", mlp, dtype)
        if trained:
            yield Transfer("attention gradients", ("tsp",), "reduce", attention, "fp32")
            yield Transfer("mlp gradients", ("tsp",), "shift", mlp, "fp32")


def _keys_and_values(config: Config) -> Iterator[Transfer]:
    """Of one bucket, over the ranks that share a sequence."""
    m, p, t = config.model, config.parallel, config.trainer
    ranks, both = p.cp * p.tsp, ("cp", "tsp")
    kv_heads = m.num_query_groups // p.tp // p.attention_buckets
    one = t.micro_batch_size * t.seq_length // ranks * m.kv_channels  # elements of a rank and head
    own, exchange = 2 * kv_heads * one, p.kv_exchange
    if exchange == "hierarchical" and 1 in (p.cp, p.tsp):
        exchange = "allgather" if p.cp == 1 else "ring"
    if exchange == "ulysses":
        heads = m.num_attention_heads // p.tp // p.attention_buckets
        yield Transfer("q, k and v", both, "all_to_all", (heads + 2 * kv_heads) * one, t.dtype)
    elif exchange == "allgather":
        yield Transfer("k and v", both, "all_gather", ranks * own, t.dtype)
        yield Transfer("gradients of k and v", both, "reduce_scatter", ranks * own, "fp32")
    elif exchange == "ring":
        yield Transfer("k and v", both, "shift", own, t.dtype)
        yield Transfer("gradients of k and v", both, "shift", own, "fp32")
    else:
        yield Transfer("k and v", ("tsp",), "all_gather", p.tsp * own, t.dtype)
        yield Transfer("gradients of k and v", ("tsp",), "reduce_scatter", p.tsp * own, "fp32")
        yield Transfer("k and v", ("cp",), "shift", own, t.dtype)
        yield Transfer("gradients of k and v", ("cp",), "shift", own, "fp32")


def _tokens(config: Config) -> Iterator[Transfer]:
    """Of tp: the residual of the group's tokens, before and after attention and MLP."""
    t, p = config.trainer, config.parallel
    elements = t.micro_batch_size * t.seq_length // p.cp * config.model.hidden_size
    yield Transfer("tokens", ("tp",), "all_gather", elements, t.dtype)
    yield Transfer("tokens", ("tp",), "reduce_scatter", elements, t.dtype)


def _data_parallel(config: Config) -> Iterator[Transfer]:
    """FSDP's weights and gradients of a layer, and their sum over replicas; see model/parallelize.py."""
    p = config.parallel
    shard = ("dp_shard", "cp") if p.fsdp_over_cp else ("dp_shard",)
    replicate = ("dp_replicate",) if p.fsdp_over_cp else ("dp_replicate", "cp")
    layer = config.model.hidden_size * sum(
        width(bucket) for part in parts(config.model, p)[:2] for bucket in part.buckets
    )
    trained = _adapters(config) if config.finetune.lora_rank else layer // p.tsp
    shards = p.dp_shard * (p.cp if p.fsdp_over_cp else 1)
    yield Transfer("layer's weights", shard, "all_gather", layer // p.tsp, config.trainer.dtype)
    yield Transfer("layer's gradients", shard, "reduce_scatter", trained, "fp32")
    yield Transfer("layer's gradients", replicate, "all_reduce", -(-trained // shards), "fp32")


def _adapters(config: Config) -> int:
    """Elements of a layer's low-rank adapters that one rank of the model axis holds."""
    m, p = config.model, config.parallel
    heads, kv_heads = m.num_attention_heads * m.kv_channels, m.num_query_groups * m.kv_channels
    others = {
        "q_proj": heads, "k_proj": kv_heads, "v_proj": kv_heads, "o_proj": heads,
        "gate_proj": m.ffn_hidden_size, "up_proj": m.ffn_hidden_size, "down_proj": m.ffn_hidden_size,
    }  # fmt: skip
    sides = (m.hidden_size // p.tsp + others[name] // p.tp for name in set(config.finetune.lora_targets))
    return config.finetune.lora_rank * sum(sides)
