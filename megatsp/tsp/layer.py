"""One decoder layer: x + attention(norm(x)), then + mlp(norm(.)).

Under tensor parallelism norms and residuals see this rank's own tokens, attention and MLP those of
its tp group (see tp/tokens.py); otherwise the two are the same.

What the backward computes again, by `recompute_granularity`; beside x every setting keeps

    none       q, k, v, attention's out and log-sum-exp, the MLP's input, gate and up
    selective  attention's out and log-sum-exp, the MLP's input
    full       nothing: attention runs again first, with its weights, keys and values sent again

The MLP's own forward is never run again: its backward needs its input alone.

With adapters (see lora.py) all else is frozen: the backward computes and sends gradients of theirs alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatsp.tp.tokens import GroupTokens
from megatsp.tsp.attention import HeadVectors, Positions, SavedBucket, StreamedAttention
from megatsp.tsp.lora import AdapterPair, Adapters, of_parts
from megatsp.tsp.mlp import StreamedMLP
from megatsp.tsp.operations import Norm
from megatsp.tsp.small import Arriving, Small


@dataclass
class LayerTensors:
    """This rank's tensors of one layer, in the order autograd sees them.

    attention: q, k, v, o; mlp: gate, up, down; gains: before attention, before the MLP;
    vectors: biases and head gains; adapters: those of some matrices, in the order of the matrices.
    """

    attention: Sequence[Tensor]
    mlp: Sequence[Tensor]
    gains: Sequence[Tensor]
    vectors: HeadVectors
    adapters: Sequence[AdapterPair] = ()

    def flat(self) -> list[Tensor]:
        pairs = (tensor for pair in self.adapters for tensor in (pair.a, pair.b))
        return [*self.attention, *self.mlp, *self.gains, *self.vectors.tensors(), *pairs]

    @property
    def adapted(self) -> list[int]:
        """The matrices that have adapters."""
        return [pair.matrix for pair in self.adapters]

    def rows(self) -> list[Tensor]:
        """What is cut over h and not streamed: [h/D], or [r, h/D]."""
        return [*self.gains, *(pair.outer for pair in self.adapters)]


class StreamedLayer:
    """Computes one layer. `prefetch_forward` posts its first transfers; see `LayerTensors`.

    adapter_scale: what B A is multiplied with.
    """

    def __init__(
        self,
        attention: StreamedAttention,
        mlp: StreamedMLP,
        small: Small,
        tokens: GroupTokens,
        norm: Norm,
        epsilon: float,
        recompute: str,
        adapter_scale: float = 1.0,
    ) -> None:
        self.adapter_scale = adapter_scale
        self.attention, self.mlp, self.small, self.tokens = attention, mlp, small, tokens
        self.norm, self.epsilon, self.recompute = norm, epsilon, recompute

    def prefetch_forward(self, tensors: LayerTensors) -> None:
        self.small.prefetch(tensors.rows())
        self.attention.prefetch(tensors.attention)

    def prefetch_backward(self, tensors: LayerTensors) -> None:
        if self.recompute == "full":
            self.attention.prefetch(tensors.attention)
        else:
            self.mlp.prefetch(tensors.mlp)

    def __call__(
        self,
        x: Tensor,
        tensors: LayerTensors,
        positions: Positions,
        following: Callable[[], None] | None,
        preceding: Callable[[], None] | None,
    ) -> Tensor:
        """[B, T_local, h] to [B, T_local, h].

        following: posts what comes after this layer's forward; preceding: after its backward.
        """
        grad = torch.is_grad_enabled()
        return _Layer.apply(x, self, tensors, positions, following, preceding, grad, *tensors.flat())

    def adapters(self, tensors: LayerTensors, rows: Tensor, dtype: torch.dtype) -> tuple[Adapters, Adapters]:
        """Attention's and the MLP's; rows: the whole `LayerTensors.rows`."""
        return of_parts(tensors.adapters, rows[len(tensors.gains) :], self.adapter_scale, dtype)


@dataclass
class _Saved:
    rows: Tensor  # gains, then the adapters' sides that have h: [n, h]
    attention: dict[int, SavedBucket]
    mlp_input: Tensor | None
    mlp: dict[int, Tensor]


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        layer: StreamedLayer,
        tensors: LayerTensors,
        positions: Positions,
        following: Callable[[], None] | None,
        preceding: Callable[[], None] | None,
        grad: bool,
        *flat: Tensor,
    ) -> Tensor:
        rows = layer.small.gains(tensors.rows())
        adapters = layer.adapters(tensors, rows, x.dtype)
        keep = grad and layer.recompute == "none"
        middle, normed, attention = _attention_forward(
            layer, x, rows, tensors, positions, keep, partial(layer.mlp.prefetch, tensors.mlp), adapters[0]
        )
        full = layer.recompute == "full"
        if full or not grad:
            attention.clear()
        normed = layer.tokens.gather(normed, "mlp/tokens").wait()
        y, mlp = layer.mlp.forward(normed, tensors.mlp, keep, following, adapters[1])
        y = layer.tokens.reduce_scatter(y, "mlp/tokens").wait()
        if grad:
            ctx.save_for_backward(x, *flat)
            ctx.layer, ctx.positions, ctx.preceding = layer, positions, preceding
            ctx.vectors_present, ctx.adapted = tensors.vectors.present, tensors.adapted
            # Not by save_for_backward, which is for inputs and outputs; backward lets go of it.
            ctx.kept = _Saved(rows, attention, None if full else middle, mlp)
        return y.add_(middle).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, *flat = ctx.saved_tensors
        layer, positions, preceding = ctx.layer, ctx.positions, ctx.preceding
        kept, ctx.kept = ctx.kept, None
        tensors = _unflatten(flat, ctx.vectors_present, ctx.adapted)
        # Weights are all trained, or none is.
        frozen = not ctx.needs_input_grad[7]
        need_dx = ctx.needs_input_grad[0] or not frozen
        gains, adapters = kept.rows, layer.adapters(tensors, kept.rows, x.dtype)
        prefetch_attention = partial(layer.attention.prefetch, tensors.attention)
        prefetch_mlp = partial(layer.mlp.prefetch, tensors.mlp)

        middle, attention, kept.mlp_input = kept.mlp_input, kept.attention, None
        norm, epsilon = layer.norm, layer.epsilon
        if middle is None:
            middle, normed, attention = _attention_forward(
                layer, x, gains, tensors, positions, True, prefetch_mlp, adapters[0]
            )
        else:
            normed = norm.rms_norm(middle, gains[1], epsilon)
        normed, dy = _gathered(layer.tokens, normed, dout, "mlp/tokens")
        dnormed, mlp_gradients, dadapters_mlp = layer.mlp.backward(
            dy, normed, tensors.mlp, kept.mlp, prefetch_attention, adapters[1], frozen
        )
        dnormed = layer.tokens.reduce_scatter(dnormed, "mlp/tokens").wait()
        dmiddle, dgain_mlp = norm.rms_norm_backward(dnormed, middle, gains[1], epsilon, dout)
        del middle, normed, dy, dnormed

        normed = norm.rms_norm(x, gains[0], epsilon)
        normed, dy = _gathered(layer.tokens, normed, dmiddle.to(x.dtype), "attention/tokens")
        dnormed, attention_gradients, dvectors, dadapters = layer.attention.backward(
            dy, normed, tensors.attention, tensors.vectors, positions, attention, preceding, adapters[0],
            frozen, need_dx,
        )  # fmt: skip
        del normed, dy
        dx, dgains = None, [dgain_mlp]
        if dnormed is not None:
            dnormed = layer.tokens.reduce_scatter(dnormed, "attention/tokens").wait()
            dx, dgain_attention = norm.rms_norm_backward(dnormed, x, gains[0], epsilon, dmiddle)
            dx, dgains = dx.to(x.dtype), [dgain_attention, dgain_mlp]

        dadapters += dadapters_mlp
        if frozen:  # norms computed their gains' gradients on the way: they end here
            dgains = []
        small = layer.small.reduce([*dgains, *dadapters.outer], dvectors, dadapters.inner)
        gradients = [*attention_gradients.finish(), *mlp_gradients.finish()]
        gradients += _arrived(small, tensors, frozen)
        return (
            dx, None, None, None, None, None, None,
            *(g if g is None else g.to(t.dtype) for g, t in zip(gradients, flat, strict=True)),
        )  # fmt: skip


def _attention_forward(
    layer: StreamedLayer,
    x: Tensor,
    gains: Tensor,
    tensors: LayerTensors,
    positions: Positions,
    keep_projected: bool,
    following: Callable[[], None],
    adapters: Adapters,
) -> tuple[Tensor, Tensor, dict[int, SavedBucket]]:
    """x + attention(norm(x)) in x's dtype, the norm of that, and what attention's backward needs."""
    normed = layer.norm.rms_norm(x, gains[0], layer.epsilon)
    normed = layer.tokens.gather(normed, "attention/tokens").wait()
    y, saved = layer.attention.forward(
        normed, tensors.attention, tensors.vectors, positions, keep_projected, following, adapters
    )
    y = layer.tokens.reduce_scatter(y, "attention/tokens").wait()
    del normed
    return *layer.norm.add_rms_norm(x, y, gains[1], layer.epsilon, inplace=True), saved


def _gathered(tokens: GroupTokens, x: Tensor, dy: Tensor, label: str) -> tuple[Tensor, Tensor]:
    """Both for all tokens of the group; the two transfers run side by side."""
    pending, dpending = tokens.gather(x, label), tokens.gather(dy, label)
    return pending.wait(), dpending.wait()


def _arrived(small: Arriving, tensors: LayerTensors, frozen: bool) -> list[Tensor | None]:
    """Gradients of gains, vectors and adapters, in the order of LayerTensors.flat; None of what is frozen."""
    rows, others = small()
    gains, vectors = len(tensors.gains), len(tensors.vectors.tensors())
    adapters = []
    for pair, outer, inner in zip(
        tensors.adapters, rows[0 if frozen else gains :], others[0 if frozen else vectors :], strict=True
    ):
        adapters += pair.as_parameters(outer, inner)
    if frozen:
        return [*[None] * (gains + vectors), *adapters]
    return [*rows[:gains], *others[:vectors], *adapters]


def _unflatten(
    flat: Sequence[Tensor], vectors_present: tuple[bool, bool], adapted: Sequence[int]
) -> LayerTensors:
    """The inverse of LayerTensors.flat."""
    last = len(flat) - 2 * len(adapted)
    pairs = zip(adapted, flat[last::2], flat[last + 1 :: 2], strict=True)
    vectors = HeadVectors.of(flat[9:last], *vectors_present)
    return LayerTensors(flat[:4], flat[4:7], flat[7:9], vectors, [AdapterPair(*pair) for pair in pairs])
