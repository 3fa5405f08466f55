"""The transfers that a run will make, at their sizes, and the ranks that make each together.

Read off the validated configuration: of the streamed buckets, and of FSDP's units, the widest one.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch.distributed.tensor import Shard

from megatsp.axes import axis_sizes
from megatsp.cluster.mesh import coordinates
from megatsp.comm import Comm
from megatsp.model.gpt import GPT, add_adapters
from megatsp.model.parallelize import parts, placement
from megatsp.schema import AXES, Config, ParallelConfig
from megatsp.tsp.buckets import Part, width
from megatsp.tsp.owner import Broadcast

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
    return [transfer for transfer in found if math.prod(sizes[axis] for axis in transfer.axes) > 1]


def groups(axes: Sequence[str], parallel: ParallelConfig) -> list[list[int]]:
    """The groups that span these axes, each as its ranks in order."""
    sizes = axis_sizes(parallel)
    found: dict[tuple[int, ...], list[int]] = {}
    for rank in range(math.prod(sizes)):
        place = coordinates(rank, sizes)
        found.setdefault(tuple(place[axis] for axis in AXES if axis not in axes), []).append(rank)
    return list(found.values())


def _weights(config: Config) -> Iterator[Transfer]:
    """Of tsp: the columns of the widest bucket, or of its widest piece, and their gradient in fp32."""
    p, dtype, h = config.parallel, config.trainer.dtype, config.model.hidden_size
    all_parts = parts(config.model, p)
    gathered = all_parts if p.tsp_layout == "hidden" else all_parts[2:]
    columns, label = max((width(b), part.label) for part in gathered for b in part.buckets)
    trained = not config.finetune.lora_rank
    yield Transfer(f"{label} weights", ("tsp",), "all_gather", columns * h, dtype)
    if trained:
        yield Transfer(f"{label} gradients", ("tsp",), "reduce_scatter", columns * h, "fp32")
    if p.tsp_layout == "owner":
        attention, mlp = _widest_piece(all_parts[0], p.tsp) * h, max(map(width, all_parts[1].buckets)) * h
        yield Transfer("attention weights", ("tsp",), "broadcast", attention, dtype)
        yield Transfer("mlp weights", ("tsp",), "shift", mlp, dtype)
        if trained:
            yield Transfer("attention gradients", ("tsp",), "reduce", attention, "fp32")
            yield Transfer("mlp gradients", ("tsp",), "shift", mlp, "fp32")


def _widest_piece(part: Part, ranks: int) -> int:
    """Columns of the most that one owner broadcasts at once."""
    comm = Comm(None)
    comm.size = ranks
    transport = Broadcast(part, comm, torch.float32)
    steps = range(transport.steps)
    return max(stop - start for step in steps for _, start, stop, _ in transport.pieces(step))


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
    """FSDP's weights and gradients of its widest units, and their sum over replicas."""
    p = config.parallel
    shard = ("dp_shard", "cp") if p.fsdp_over_cp else ("dp_shard",)
    replicate = ("dp_replicate",) if p.fsdp_over_cp else ("dp_replicate", "cp")
    shards = p.dp_shard * (p.cp if p.fsdp_over_cp else 1)
    held, trained = (Counter[str]() for _ in range(2))
    for unit, elements, is_trained in _fsdp_shards(config, shards):
        held[unit] += elements
        trained[unit] += elements * is_trained
    ((unit, elements),) = held.most_common(1)
    yield Transfer(f"{unit}'s weights", shard, "all_gather", elements * shards, config.trainer.dtype)
    ((unit, elements),) = trained.most_common(1)
    yield Transfer(f"{unit}'s gradients", shard, "reduce_scatter", elements * shards, "fp32")
    yield Transfer(f"{unit}'s gradients", replicate, "all_reduce", elements, "fp32")


def _fsdp_shards(config: Config, shards: int) -> Iterator[tuple[str, int, bool]]:
    """Of each parameter, of one layer: its unit, a rank's padded elements, whether it is trained.

    See `model.parallelize._apply_fsdp`, which makes the units and cuts them.
    """
    with torch.device("meta"):
        gpt = GPT(replace(config.model, num_layers=1))
        add_adapters(gpt, config.finetune)
    on_model_axis = config.parallel.tsp * config.parallel.tp
    for name, parameter in gpt.named_parameters():
        shape, cut = list(parameter.shape), placement(name, config.parallel)
        dim = 1 if cut.is_shard(0) and len(shape) == 2 and shape[1] % shards == 0 else 0
        if isinstance(cut, Shard):
            shape[cut.dim] = -(-shape[cut.dim] // on_model_axis)
        shape[dim] = -(-shape[dim] // shards)
        if ".layers." in name:
            unit = "layer"
        elif "lm_head" in name:
            unit = "head"
        else:  # one with the last norm, unless there is a head
            unit = "embedding" if "embed_tokens" in name or gpt.lm_head is None else "norm"
        yield unit, math.prod(shape), parameter.requires_grad
