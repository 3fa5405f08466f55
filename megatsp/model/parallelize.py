"""How an `Axes` is applied to the GPT, read top to bottom: shard, FSDP, first weights, streams."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from megatsp.axes import Axes
from megatsp.model.gpt import GPT, DecoderLayer, local
from megatsp.model.init import initial_slice
from megatsp.schema import Config, ModelConfig, ParallelConfig
from megatsp.tsp.attend import SequenceAttention
from megatsp.tsp.attention import StreamedAttention
from megatsp.tsp.buckets import Part, attention_part, even_cuts, head_part, mlp_part, owner_cuts
from megatsp.tsp.embedding import embed
from megatsp.tsp.head import StreamedHead
from megatsp.tsp.layer import LayerTensors, StreamedLayer
from megatsp.tsp.mlp import StreamedMLP
from megatsp.tsp.partition import local_positions
from megatsp.tsp.small import SmallParameters
from megatsp.tsp.stream import WeightStream
from megatsp.tsp.transport import Broadcast, Gather, Ring, Transport

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# Which dim of a parameter is the residual width h, by the end of its name.
H_DIM = {
    "embed_tokens": 1, "lm_head": 1,
    "q_proj": 1, "k_proj": 1, "v_proj": 1, "o_proj": 0,
    "gate_proj": 1, "up_proj": 1, "down_proj": 0,
    "input_layernorm": 0, "post_attention_layernorm": 0, "norm": 0,
}  # fmt: skip
LAYER_MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def h_dim(name: str) -> int | None:
    """The h dim of the parameter called `name`; None for biases and head gains, which have none."""
    owner, kind = name.split(".")[-2:]
    return None if kind == "bias" else H_DIM.get(owner)


def placement(name: str, layout: str) -> Placement:
    """How a parameter lies on the tsp axis.

    `hidden` cuts h; `owner` cuts the other dim of a layer's matrices. Vectors without h are whole.
    """
    dim = h_dim(name)
    if dim is None:
        return Replicate()
    if layout == "owner" and name.split(".")[-2] in LAYER_MATRICES:
        return Shard(1 - dim)
    return Shard(dim)


def build_model(config: Config, axes: Axes) -> GPT:
    """The GPT of `config` on this rank, with its first weights.

    Parameters are fp32 DTensors over the mesh (tsp alone, or dp axes and tsp), named and shaped
    as in a Hugging Face state dict.

    Raises:
        ValueError: a dtype or head width that a GPU's flash attention does not take.
    """
    if axes.device.type == "cuda":
        _check_gpu(config)
    with torch.device("meta"):
        gpt = GPT(config.model)
    _shard(gpt, config.parallel.tsp_layout, axes)
    if axes.dp_size > 1:
        _apply_fsdp(gpt, DTYPES[config.trainer.dtype], axes)
    gpt.to_empty(device=axes.device)
    _initialise(gpt, config, axes)
    _attach_streams(gpt, config, axes)
    return gpt


def _check_gpu(config: Config) -> None:
    if config.trainer.dtype == "fp32":
        raise ValueError("trainer.dtype=fp32: flash attention on a GPU needs bf16, or use launch.device=cpu")
    if config.model.kv_channels % 8 or config.model.kv_channels > 256:
        raise ValueError(
            f"model.kv_channels={config.model.kv_channels}: flash attention on a GPU takes multiples of 8 "
            "up to 256, or use launch.device=cpu"
        )


def _shard(gpt: GPT, layout: str, axes: Axes) -> None:
    """Replaces every parameter by a DTensor on the tsp axis (still without data)."""
    for name, parameter in list(gpt.named_parameters()):
        module_name, _, kind = name.rpartition(".")
        sharded = distribute_tensor(
            parameter.data, axes.mesh["tsp"], [placement(name, layout)], src_data_rank=None
        )
        setattr(gpt.get_submodule(module_name), kind, nn.Parameter(sharded))


def _apply_fsdp(gpt: GPT, dtype: torch.dtype, axes: Axes) -> None:
    """FSDP2 over dp_shard, replicas over dp_replicate; one unit a layer, one for the rest.

    Weights travel over dp in the compute dtype. Gradients, summed over tsp in fp32, take the compute
    dtype once (FSDP2's parameter has it) and are summed over dp in fp32; not averaged: the loss is
    already divided by the global number of tokens.
    """
    shards = axes.mesh["dp_shard"].size()

    def shard_placement(parameter: nn.Parameter) -> Shard | None:
        assert isinstance(parameter, DTensor)
        # The other dim than tsp's, if it divides; dim 0, cut within tsp's shards, otherwise.
        (on_tsp,) = parameter.placements
        if on_tsp.is_shard(0) and parameter.dim() == 2 and parameter.shape[1] % shards == 0:
            return Shard(1)
        return None

    mesh = axes.mesh["dp_replicate", "dp_shard"] if axes.mesh.size(0) > 1 else axes.mesh["dp_shard"]
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in (*gpt.model.layers, gpt):
        fully_shard(module, mesh=mesh, mp_policy=policy, shard_placement_fn=shard_placement)
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no pre-multiplied sum


def reshard(gpt: GPT) -> None:
    """Back to the sharded fp32 parameters, where a forward without a backward left gathered ones."""
    for module in gpt.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def _initialise(gpt: GPT, config: Config, axes: Axes) -> None:
    """Matrices normal (o and down projections over sqrt(2 layers)), gains one, biases zero."""
    std = config.model.init_method_std
    for name, parameter in gpt.named_parameters():
        assert isinstance(parameter, DTensor)
        if parameter.dim() == 1:
            parameter.to_local().fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        dim = h_dim(name)
        assert dim is not None
        scale = (
            math.sqrt(2 * config.model.num_layers) if name.split(".")[-2] in ("o_proj", "down_proj") else 1
        )
        # Ranges of this rank's tsp shard in the logical tensor, by dim.
        ranges = [(0, n) for n in parameter.shape]
        cut = placement(name, config.parallel.tsp_layout)
        assert isinstance(cut, Shard)
        length = parameter.shape[cut.dim]
        first = min(length, -(-length // axes.tsp.size) * axes.tsp.rank)
        ranges[cut.dim] = (first, min(length, first + -(-length // axes.tsp.size)))
        values = initial_slice(
            config.trainer.seed, name, ranges[dim], ranges[1 - dim], parameter.shape[1 - dim], std / scale
        )
        values = values if dim == 0 else values.t()
        if len(parameter.placements) > 1:  # FSDP cuts the tsp shard once more
            fsdp_dim = parameter.placements[-2].dim  # type: ignore[attr-defined]  # Shard or _StridedShard
            pieces = values.chunk(axes.mesh["dp_shard"].size(), fsdp_dim)
            rank = axes.mesh.get_local_rank("dp_shard")
            values = pieces[rank] if rank < len(pieces) else values.narrow(fsdp_dim, 0, 0)
        parameter.to_local().copy_(values)


class Engine:
    """What the GPT asks of its mesh beside the layers: embedding, positions, head, prefetches."""

    def __init__(self, gpt: GPT, head: StreamedHead, axes: Axes, dtype: torch.dtype) -> None:
        self.head = head
        self._comm, self._dtype, self._gpt = axes.tsp, dtype, gpt
        # Under FSDP the next layer's weights are not there yet when this one ends.
        self._across_layers = axes.dp_size == 1

    def positions(self, ids: Tensor) -> Tensor:
        """Global positions of the local tokens: int64 [T/D]."""
        return local_positions(ids.shape[1] * self._comm.size, self._comm.rank, self._comm.size, ids.device)

    def embed(self, ids: Tensor, weight: Tensor) -> Tensor:
        return embed(ids, weight, self._comm, self._dtype)

    def after_forward(self, index: int, with_head: bool) -> Callable[[], None] | None:
        """Posts what comes after layer `index` in the forward: the next layer, or the head."""
        gpt = self._gpt
        if not self._across_layers:
            return None
        if index + 1 < len(gpt.model.layers):
            layer = gpt.layer(index + 1)
            return lambda: layer.stream.prefetch_forward(_shards(layer))
        if not with_head:
            return None
        return lambda: self.head.prefetch_forward(
            local(gpt.model.norm.weight).detach(), local(gpt.head_weight).detach()
        )

    def after_backward(self, index: int) -> Callable[[], None] | None:
        """Posts what comes after layer `index` (or, past the last, the head) in the backward."""
        if not self._across_layers or index == 0:
            return None
        layer = self._gpt.layer(index - 1)
        return lambda: layer.stream.prefetch_backward(_shards(layer))


@torch.no_grad()
def _shards(layer: DecoderLayer) -> LayerTensors:
    return layer.tensors()


def _transport(part: Part, parallel: ParallelConfig, axes: Axes, dtype: torch.dtype) -> Transport:
    """`hidden` gathers everything; `owner` broadcasts attention and passes the MLP round a ring."""
    if parallel.tsp_layout == "hidden" or part.label == "head":
        return Gather(part, axes.tsp, dtype)
    if part.label == "attention":
        return Broadcast(part, axes.tsp, dtype)
    return Ring(part, axes.tsp, dtype)


def parts(model: ModelConfig, parallel: ParallelConfig) -> tuple[Part, Part, Part]:
    """The attention, MLP and head parts in the configured numbers of buckets."""
    if parallel.tsp_layout == "owner":
        cuts = owner_cuts(model.ffn_hidden_size, parallel.tsp, parallel.mlp_buckets // parallel.tsp)
    else:
        cuts = even_cuts(model.ffn_hidden_size, parallel.mlp_buckets)
    attention = attention_part(
        model.num_attention_heads, model.num_query_groups, model.kv_channels, parallel.attention_buckets
    )
    return (
        attention,
        mlp_part(model.ffn_hidden_size, cuts),
        head_part(model.vocab_size, parallel.head_buckets),
    )


def _attach_streams(gpt: GPT, config: Config, axes: Axes) -> None:
    """Gives every layer and the head their streams."""
    model, dtype = config.model, DTYPES[config.trainer.dtype]
    attention, mlp, head = (
        _transport(p, config.parallel, axes, dtype) for p in parts(model, config.parallel)
    )
    sequence = SequenceAttention(axes.tsp, config.parallel.kv_exchange, model.kv_channels**-0.5)
    for index in range(model.num_layers):
        gpt.layer(index).stream = StreamedLayer(
            StreamedAttention(model, WeightStream(attention), sequence),
            StreamedMLP(WeightStream(mlp)),
            SmallParameters(axes.tsp),
            model.norm_epsilon,
            config.trainer.recompute_granularity,
        )
    streamed_head = StreamedHead(WeightStream(head), SmallParameters(axes.tsp), model.norm_epsilon)
    gpt.engine = Engine(gpt, streamed_head, axes, dtype)
