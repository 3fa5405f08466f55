"""One decoder layer: x + attention(norm(x)), then + mlp(norm(.)).

Under tensor parallelism norms and residuals see this rank's own tokens, attention and MLP those of
its tp group (see tp/tokens.py); otherwise the two are the same.

What the backward computes again, by `recompute_granularity`; beside x every setting keeps

    none       q, k, v, attention's out and log-sum-exp, the MLP's input, gate and up
    selective  attention's out and log-sum-exp, the MLP's input
    full       nothing: attention runs again first, with its weights, keys and values sent again

The MLP's own forward is never run again: its backward needs its input alone.
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
from megatsp.tsp.mlp import StreamedMLP
from megatsp.tsp.operations import Norm
from megatsp.tsp.small import Small


@dataclass
class LayerTensors:
    """This rank's tensors of one layer, in the order autograd sees them.

    attention: q, k, v, o; mlp: gate, up, down; gains: before attention, before the MLP;
    vectors: biases and head gains.
    """

    attention: Sequence[Tensor]
    mlp: Sequence[Tensor]
    gains: Sequence[Tensor]
    vectors: HeadVectors

    def flat(self) -> list[Tensor]:
        return [*self.attention, *self.mlp, *self.gains, *self.vectors.tensors()]


class StreamedLayer:
    """Computes one layer. `prefetch_forward` posts its first transfers; see `LayerTensors`."""

    def __init__(
        self,
        attention: StreamedAttention,
        mlp: StreamedMLP,
        small: Small,
        tokens: GroupTokens,
        norm: Norm,
        epsilon: float,
        recompute: str,
    ) -> None:
        self.attention, self.mlp, self.small, self.tokens = attention, mlp, small, tokens
        self.norm, self.epsilon, self.recompute = norm, epsilon, recompute

    def prefetch_forward(self, tensors: LayerTensors) -> None:
        self.small.prefetch(tensors.gains)
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


@dataclass
class _Saved:
    gains: Tensor
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
        gains = layer.small.gains(tensors.gains)
        keep = grad and layer.recompute == "none"
        middle, normed, attention = _attention_forward(
            layer, x, gains, tensors, positions, keep, partial(layer.mlp.prefetch, tensors.mlp)
        )
        full = layer.recompute == "full"
        if full or not grad:
            attention.clear()
        normed = layer.tokens.gather(normed, "mlp/tokens").wait()
        y, mlp = layer.mlp.forward(normed, tensors.mlp, keep, following)
        y = layer.tokens.reduce_scatter(y, "mlp/tokens").wait()
        if grad:
            ctx.save_for_backward(x, *flat)
            ctx.layer, ctx.positions, ctx.preceding = layer, positions, preceding
            ctx.vectors_present = tensors.vectors.present
            # Not by save_for_backward, which is for inputs and outputs; backward lets go of it.
            ctx.kept = _Saved(gains, attention, None if full else middle, mlp)
        return y.add_(middle).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, *flat = ctx.saved_tensors
        layer, positions, preceding = ctx.layer, ctx.positions, ctx.preceding
        kept, ctx.kept = ctx.kept, None
        tensors = _unflatten(flat, *ctx.vectors_present)
        prefetch_attention = partial(layer.attention.prefetch, tensors.attention)
        prefetch_mlp = partial(layer.mlp.prefetch, tensors.mlp)

        middle, attention, kept.mlp_input = kept.mlp_input, kept.attention, None
        norm, epsilon = layer.norm, layer.epsilon
        if middle is None:
            middle, normed, attention = _attention_forward(
                layer, x, kept.gains, tensors, positions, True, prefetch_mlp
            )
        else:
            normed = norm.rms_norm(middle, kept.gains[1], epsilon)
        normed, dy = _gathered(layer.tokens, normed, dout, "mlp/tokens")
        dnormed, mlp_gradients = layer.mlp.backward(dy, normed, tensors.mlp, kept.mlp, prefetch_attention)
        dnormed = layer.tokens.reduce_scatter(dnormed, "mlp/tokens").wait()
        dmiddle, dgain_mlp = norm.rms_norm_backward(dnormed, middle, kept.gains[1], epsilon, dout)
        del middle, normed, dy, dnormed

        normed = norm.rms_norm(x, kept.gains[0], epsilon)
        normed, dy = _gathered(layer.tokens, normed, dmiddle.to(x.dtype), "attention/tokens")
        dnormed, attention_gradients, dvectors = layer.attention.backward(
            dy, normed, tensors.attention, tensors.vectors, positions, attention, preceding
        )
        dnormed = layer.tokens.reduce_scatter(dnormed, "attention/tokens").wait()
        del normed, dy
        dx, dgain_attention = norm.rms_norm_backward(dnormed, x, kept.gains[0], epsilon, dmiddle)

        small = layer.small.reduce([dgain_attention, dgain_mlp], dvectors)
        gradients = [*attention_gradients.finish(), *mlp_gradients.finish()]
        dgains, dvector_sums = small()
        gradients += [*dgains, *dvector_sums]
        return (
            dx.to(x.dtype), None, None, None, None, None, None,
            *(g.to(t.dtype) for g, t in zip(gradients, flat, strict=True)),
        )  # fmt: skip


def _attention_forward(
    layer: StreamedLayer,
    x: Tensor,
    gains: Tensor,
    tensors: LayerTensors,
    positions: Positions,
    keep_projected: bool,
    following: Callable[[], None],
) -> tuple[Tensor, Tensor, dict[int, SavedBucket]]:
    """x + attention(norm(x)) in x's dtype, the norm of that, and what attention's backward needs."""
    normed = layer.norm.rms_norm(x, gains[0], layer.epsilon)
    normed = layer.tokens.gather(normed, "attention/tokens").wait()
    y, saved = layer.attention.forward(
        normed, tensors.attention, tensors.vectors, positions, keep_projected, following
    )
    y = layer.tokens.reduce_scatter(y, "attention/tokens").wait()
    del normed
    return *layer.norm.add_rms_norm(x, y, gains[1], layer.epsilon, inplace=True), saved


def _gathered(tokens: GroupTokens, x: Tensor, dy: Tensor, label: str) -> tuple[Tensor, Tensor]:
    """Both for all tokens of the group; the two transfers run side by side."""
    pending, dpending = tokens.gather(x, label), tokens.gather(dy, label)
    return pending.wait(), dpending.wait()


def _unflatten(flat: Sequence[Tensor], biased: bool, head_normed: bool) -> LayerTensors:
    """The inverse of LayerTensors.flat."""
    return LayerTensors(flat[:4], flat[4:7], flat[7:9], HeadVectors.of(flat[9:], biased, head_normed))
