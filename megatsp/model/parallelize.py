"""How an `Axes` is applied to the GPT, read top to bottom: shard, FSDP, first weights, streams."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from megatsp.axes import Axes
from megatsp.cp.documents import Documents
from megatsp.cp.sequence import sequence_attention
from megatsp.kernels import choose_kernels, resolve
from megatsp.model.gpt import ADAPTER, GPT, DecoderLayer, add_adapters, local
from megatsp.model.init import initial_slice
from megatsp.parallel_rules import has_wide_norm
from megatsp.schema import MATRICES, Config, ModelConfig, ParallelConfig
from megatsp.tp.embedding import embed_vocabulary_parallel
from megatsp.tp.small import ReplicatedGains
from megatsp.tp.tokens import GroupTokens
from megatsp.tsp.attention import StreamedAttention
from megatsp.tsp.attention_wide_norm import WideNormAttention
from megatsp.tsp.buckets import Part, attention_part, even_cuts, head_part, mlp_part, owner_cuts
from megatsp.tsp.embedding import embed
from megatsp.tsp.head import StreamedHead
from megatsp.tsp.layer import LayerTensors, StreamedLayer
from megatsp.tsp.mlp import StreamedMLP
from megatsp.tsp.owner import Broadcast, Ring
from megatsp.tsp.residual import NormAfter, NormBefore
from megatsp.tsp.small import Small, SmallParameters
from megatsp.tsp.stream import WeightStream
from megatsp.tsp.streamed import Overlap, Streamed, choose_overlap
from megatsp.tsp.transport import Gather, Resident, Transport

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# Which dim of a parameter is the residual width h, by the end of its name.
H_DIM = {
    "embed_tokens": 1, "lm_head": 1,
    "q_proj": 1, "k_proj": 1, "v_proj": 1, "o_proj": 0,
    "gate_proj": 1, "up_proj": 1, "down_proj": 0,
    "input_layernorm": 0, "post_attention_layernorm": 0, "post_feedforward_layernorm": 0, "norm": 0,
}  # fmt: skip


def h_dim(name: str) -> int | None:
    """The h dim of the parameter called `name`; None for biases, head gains, and one side of each adapter."""
    *_, adapted, owner, kind = ("", *name.split("."))
    if owner in ADAPTER:  # A [r, in], B [out, r]
        dim = H_DIM[adapted]
        return dim if dim == (1 if owner == "lora_A" else 0) else None
    return None if kind == "bias" else H_DIM.get(owner)


def placement(name: str, parallel: ParallelConfig) -> Placement:
    """How a parameter lies on the axis that cuts weights.

    tsp: `hidden` cuts h, `owner` the other dim of a layer's matrices; vectors and adapters' sides without h
    are whole, those with h cut over it. tp: the other dim of every matrix, and biases and adapters' sides
    with it; norm and head gains and adapters' sides with h are whole.
    """
    dim, owner = h_dim(name), name.split(".")[-2]
    if max(parallel.tsp, parallel.tp) == 1:
        return Replicate()
    if parallel.tp > 1:
        if owner in ADAPTER:
            return Shard(1 if owner == "lora_A" else 0) if dim is None else Replicate()
        if name.endswith("bias"):
            return Shard(0)
        return Replicate() if dim is None or owner.endswith("norm") else Shard(1 - dim)
    if dim is None:
        return Replicate()
    return Shard(1 - dim if parallel.tsp_layout == "owner" and owner in MATRICES else dim)


def build_model(config: Config, axes: Axes, fake: FakeTensorMode | None = None) -> GPT:
    """The GPT of `config` on this rank, with its first weights.

    Parameters are DTensors over `axes.weights` (its last dim alone without FSDP), named and shaped as in a
    Hugging Face state dict: fp32, but frozen ones (those beside adapters) are of the compute dtype.

    fake: gives the parameters neither memory nor values.

    Raises:
        ValueError: a dtype or head width that a GPU's flash attention does not take;
            parallel.overlap=fused where that is impossible.
    """
    _check_attention(config, axes.device)
    gpt = lay_out(config, axes)
    with fake or nullcontext():
        gpt.to_empty(device=axes.device)
    if fake is None:
        initialise(gpt, config, axes)
    attach_streams(gpt, config, axes, fake is not None)
    return gpt


def lay_out(config: Config, axes: Axes) -> GPT:
    """The GPT of `config` without data, on torch's meta device: which rank holds which part of what."""
    with torch.device("meta"):
        gpt = GPT(config.model)
        add_adapters(gpt, config.finetune)
    shard(gpt, config.parallel, axes, DTYPES[config.trainer.dtype])
    if axes.has_fsdp:
        _apply_fsdp(gpt, DTYPES[config.trainer.dtype], axes)
    return gpt


def _check_attention(config: Config, device: torch.device) -> None:
    attention = resolve(config.kernels, device)["attention"]
    if attention == "torch" and device.type == "cpu":
        return  # it takes everything
    if config.trainer.dtype == "fp32" and attention != "triton":
        raise ValueError(
            f"trainer.dtype=fp32: kernels.attention={attention} on a GPU needs bf16; use trainer.dtype=bf16, "
            "kernels.attention=triton or launch.device=cpu"
        )
    if config.model.kv_channels % 8 or config.model.kv_channels > 256:
        raise ValueError(
            f"model.kv_channels={config.model.kv_channels}: kernels.attention={attention} takes multiples of "
            "8 up to 256; kernels.attention=torch with launch.device=cpu takes any"
        )


def shard(gpt: GPT, parallel: ParallelConfig, axes: Axes, frozen: torch.dtype = torch.float32) -> None:
    """Replaces every parameter by a DTensor on the axis that cuts weights (still without data).

    frozen: the type of those that are not trained; the others are fp32.
    """
    for name, parameter in list(gpt.named_parameters()):
        module_name, _, kind = name.rpartition(".")
        trained = parameter.requires_grad
        sharded = distribute_tensor(
            parameter.data.to(torch.float32 if trained else frozen),
            axes.weights["model"],
            [placement(name, parallel)],
            src_data_rank=None,
        )
        setattr(gpt.get_submodule(module_name), kind, nn.Parameter(sharded, trained))


def _apply_fsdp(gpt: GPT, dtype: torch.dtype, axes: Axes) -> None:
    """FSDP2 over `axes.weights`; one unit a layer, and one each for an untied embedding and head.

    Weights travel in the compute dtype. Gradients, summed over tsp in fp32, take the compute dtype
    once (FSDP2's parameter has it) and are summed over the other axes in fp32; not averaged: the loss
    is already divided by the global number of tokens.
    """
    shards = axes.weights["shard"].size()

    def shard_placement(parameter: nn.Parameter) -> Shard | None:
        assert isinstance(parameter, DTensor)
        # The other dim than the model axis's, if it divides; dim 0, cut within its shards, otherwise.
        (on_model,) = parameter.placements
        if on_model.is_shard(0) and parameter.dim() == 2 and parameter.shape[1] % shards == 0:
            return Shard(1)
        return None

    mesh = axes.weights["replicate", "shard"] if axes.weights.size(0) > 1 else axes.weights["shard"]
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    units = [*gpt.model.layers, gpt]
    if gpt.lm_head is not None:
        units = [gpt.model.embed_tokens, gpt.lm_head, *units]
    for module in units:
        fully_shard(module, mesh=mesh, mp_policy=policy, shard_placement_fn=shard_placement)
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no pre-multiplied sum


def reshard(gpt: GPT) -> None:
    """Back to the sharded parameters, where a forward without a backward left gathered ones."""
    for module in gpt.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def initialise(gpt: GPT, config: Config, axes: Axes) -> None:
    """Matrices normal (o and down projections over sqrt(2 layers)), gains one, biases zero.

    Adapters as PEFT's: A of variance 1 / (3 in), that of its uniform distribution; B zero. What
    finetune.hf gives is NaN until it is loaded: nothing is drawn in vain, or left as drawn.
    """
    for name, parameter in gpt.named_parameters():
        assert isinstance(parameter, DTensor)
        if config.finetune.hf and ".lora_" not in name:
            parameter.to_local().fill_(math.nan)
            continue
        if parameter.dim() == 1:
            parameter.to_local().fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        if name.endswith("lora_B.weight"):
            parameter.to_local().zero_()
            continue
        dim, std = _first_values(name, parameter.shape, config.model)
        # Ranges of this rank's shard in the logical tensor, by dim.
        ranges = [(0, n) for n in parameter.shape]
        cut = placement(name, config.parallel)
        if isinstance(cut, Shard):
            ranges[cut.dim] = share(parameter.shape[cut.dim], axes.model.rank, axes.model.size)
        values = initial_slice(
            config.trainer.seed, name, ranges[dim], ranges[1 - dim], parameter.shape[1 - dim], std
        )
        values = values if dim == 0 else values.t()
        if len(parameter.placements) > 1:  # FSDP cuts this shard once more
            fsdp_dim = parameter.placements[-2].dim  # type: ignore[attr-defined]  # Shard or _StridedShard
            pieces = values.chunk(axes.weights["shard"].size(), fsdp_dim)
            rank = axes.weights.get_local_rank("shard")
            values = pieces[rank] if rank < len(pieces) else values.narrow(fsdp_dim, 0, 0)
        parameter.to_local().copy_(values)


def _first_values(name: str, shape: torch.Size, model: ModelConfig) -> tuple[int, float]:
    """Of a matrix: the dim whose rows are drawn apart (h where there is one), and the standard deviation."""
    if name.endswith("lora_A.weight"):
        return 1, 1 / math.sqrt(3 * shape[1])
    dim = h_dim(name)
    assert dim is not None
    writes = name.split(".")[-2] in ("o_proj", "down_proj")
    return dim, model.init_method_std / (math.sqrt(2 * model.num_layers) if writes else 1)


class Engine:
    """What the GPT asks of its mesh beside the layers: positions, a tied head, prefetches."""

    def __init__(self, gpt: GPT, head: StreamedHead, axes: Axes, overlap: Overlap) -> None:
        self.head, self.overlap = head, overlap
        self._axes, self._gpt = axes, gpt
        # Under FSDP the next layer's weights are not there yet when this one ends.
        self._across_layers = not axes.has_fsdp

    def check(self) -> None:
        """Raises PeerError if another rank has not answered in time; the host waits for nothing."""
        if self.overlap.exchange is not None:
            self.overlap.exchange.check()

    def close(self) -> None:
        """Lets go of what ranks share, once all have come here; the model is of no use afterwards."""
        if self.overlap.exchange is not None:
            if self._axes.device.type == "cuda":
                torch.cuda.synchronize(self._axes.device)
            torch.distributed.barrier(self._axes.tsp.group)
            self.overlap.exchange.close()

    def documents(self, ids: Tensor, first: Tensor) -> Documents:
        """Of a batch whose share this rank has in `ids`; first: see `GPT.__call__`.

        Raises:
            ValueError: `first` is not that of such a batch.
        """
        axes = self._axes
        expected = ids.shape[0], ids.shape[1] * axes.tp.size * axes.sequence.size
        if first.shape != expected:
            raise ValueError(f"first must be of the whole sequence, {expected}; got {tuple(first.shape)}")
        return Documents(first, axes.sequence.rank, axes.sequence.size, axes.device)

    def positions(self, ids: Tensor, documents: Documents | None) -> Tensor:
        """Where the tokens that attention computes with stand in their documents.

        int64 [T_local tp], the same in all samples, or with `documents` [B, 1, T_local tp].
        """
        positions = self._axes.positions(ids.shape[1])
        return positions if documents is None else (positions - documents.own.first)[:, None]

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


def _transport(
    part: Part, parallel: ParallelConfig, axes: Axes, dtype: torch.dtype, overlap: Overlap
) -> Transport:
    """`hidden` gathers everything; `owner` broadcasts attention and passes the MLP round a ring.

    The head's product is inside its loss, so it is gathered where the layers' weights arrive in products.
    """
    if axes.tsp.size == 1:
        return Resident(part, dtype)
    if overlap.exchange is not None and part.label != "head":
        return Streamed(part, axes.tsp, dtype, overlap.exchange)
    if parallel.tsp_layout == "hidden" or part.label == "head":
        return Gather(part, axes.tsp, dtype)
    if part.label == "attention":
        return Broadcast(part, axes.tsp, dtype)
    return Ring(part, axes.tsp, dtype)


def parts(model: ModelConfig, parallel: ParallelConfig, tp_rank: int = 0) -> tuple[Part, Part, Part]:
    """The attention, MLP and head parts, as one tp rank has them, in the configured numbers of buckets."""
    ffn, vocabulary = (
        stop - start
        for start, stop in (share(n, tp_rank, parallel.tp) for n in (model.ffn_hidden_size, model.vocab_size))
    )
    if parallel.tsp_layout == "owner" and parallel.tsp > 1:
        cuts = owner_cuts(ffn, parallel.tsp, parallel.mlp_buckets // parallel.tsp)
    else:
        cuts = even_cuts(ffn, parallel.mlp_buckets)
    attention = attention_part(
        model.num_attention_heads // parallel.tp,
        model.num_query_groups // parallel.tp,
        model.kv_channels,
        parallel.attention_buckets,
    )
    return attention, mlp_part(ffn, cuts), head_part(vocabulary, parallel.head_buckets)


def share(length: int, rank: int, ranks: int) -> tuple[int, int]:
    """[start, stop) of what DTensor's Shard gives `rank`: the same to each but the last ones."""
    chunk = -(-length // ranks)
    return min(length, chunk * rank), min(length, chunk * (rank + 1))


def attach_streams(gpt: GPT, config: Config, axes: Axes, fake: bool) -> None:
    """Gives embedding, layers and head what computes them on this mesh."""
    model, parallel, dtype = config.model, config.parallel, DTYPES[config.trainer.dtype]
    all_parts = parts(model, parallel, axes.tp.rank)
    if fake:
        overlap = Overlap(None, "simulated ranks share no memory")
    else:
        overlap = choose_overlap(
            parallel.overlap, parallel.tsp_layout, all_parts[:2], model.hidden_size, axes.tsp, axes.device,
            dtype, config.launch.timeout_s,
        )  # fmt: skip
    attention, mlp, head = (_transport(p, parallel, axes, dtype, overlap) for p in all_parts)
    kernels = choose_kernels(config.kernels, axes.device, dtype, fake)
    sequence = sequence_attention(
        parallel.kv_exchange, axes.sequence, axes.cp, axes.tsp, model.kv_channels**-0.5, kernels.attention
    )
    tokens = GroupTokens(axes.tp)
    first_row, _ = share(model.vocab_size, axes.tp.rank, axes.tp.size)

    def small() -> Small:
        return ReplicatedGains(axes.tp) if axes.tp.size > 1 else SmallParameters(axes.tsp)

    # Several buckets hold parts of what a norm over all heads sees.
    several = has_wide_norm(model) and parallel.attention_buckets > 1
    attention_of = WideNormAttention if several else StreamedAttention
    residual = NormBefore if model.norm_position == "before" else NormAfter
    for index in range(model.num_layers):
        gpt.layer(index).stream = StreamedLayer(
            attention_of(model, WeightStream(attention), sequence, kernels),
            StreamedMLP(WeightStream(mlp), kernels.swiglu),
            small(),
            tokens,
            residual(kernels.norm, model.norm_epsilon),
            config.trainer.recompute_granularity,
            config.finetune.lora_alpha / max(1, config.finetune.lora_rank),
        )
    keep = config.trainer.recompute_granularity == "none"
    streamed_head = StreamedHead(
        WeightStream(head), small(), tokens, first_row, kernels, model.norm_epsilon, keep
    )
    if axes.tp.size > 1:
        lookup = partial(embed_vocabulary_parallel, tokens=tokens, first_row=first_row, dtype=dtype)
    else:
        lookup = partial(embed, comm=axes.tsp, dtype=dtype)
    gpt.model.embed_tokens.lookup = lookup
    if gpt.lm_head is not None:
        gpt.lm_head.loss = streamed_head
    gpt.engine = Engine(gpt, streamed_head, axes, overlap)
