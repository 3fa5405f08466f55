"""One decoder layer: x + attention(norm(x)), then + mlp(norm(.)); or x + norm(attention(x)), + norm(mlp(.)).

Under tensor parallelism norms and residuals see this rank's own tokens, attention and MLP those of
its tp group (see tp/tokens.py); otherwise the two are the same.

What the backward computes again, by `recompute_granularity`; beside x every setting keeps

    none       q, k, v, attention's out and log-sum-exp, the MLP's input, gate and up
    selective  attention's out and log-sum-exp, the MLP's input
    full       nothing: attention runs again first, with its weights, keys and values sent again

The MLP's own forward is never run again: its backward needs its input alone. Norms after a sublayer
(tsp/residual.py) need what it gave: `none` and `selective` keep attention's and the MLP's outputs, and
compute the MLP's input, a norm and a sum away from them, again; `full` keeps the MLP's output.

With adapters (tsp/lora.py) all else is frozen: the backward computes and sends gradients of theirs alone.
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
from megatsp.tsp.residual import Residual
from megatsp.tsp.small import Arriving, Small


@dataclass
class LayerTensors:
    """This rank's tensors of one layer, in the order autograd sees them.

    attention: q, k, v, o; mlp: gate, up, down; gains: of attention's norm, of the MLP's;
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
        residual: Residual,
        recompute: str,
        adapter_scale: float = 1.0,
    ) -> None:
        self.attention, self.mlp, self.small, self.tokens = attention, mlp, small, tokens
        self.residual, self.recompute = residual, recompute
        self.adapter_scale = adapter_scale

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
    """rows: gains, then the adapters' sides that have h: [n, h]. middle: the MLP's residual input.

    outputs: attention's and the MLP's, before a norm of them.
    """

    rows: Tensor
    attention: dict[int, SavedBucket]
    middle: Tensor | None
    mlp: dict[int, Tensor]
    outputs: tuple[Tensor | None, Tensor | None]


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
        after, full = layer.residual.keeps_outputs, layer.recompute == "full"
        middle, read, attention, attended = _attention_forward(
            layer, x, rows, tensors, positions, keep, partial(layer.mlp.prefetch, tensors.mlp), adapters[0]
        )
        if full or not grad:
            attention.clear()
            attended = None
        read = layer.tokens.gather(read, "mlp/tokens").wait()
        y, mlp = layer.mlp.forward(read, tensors.mlp, keep, following, adapters[1])
        y = layer.tokens.reduce_scatter(y, "mlp/tokens").wait()
        if after:
            y = y.to(x.dtype)
        if grad:
            ctx.save_for_backward(x, *flat)
            ctx.layer, ctx.positions, ctx.preceding = layer, positions, preceding
            ctx.vectors_present, ctx.adapted = tensors.vectors.present, tensors.adapted
            # Not by save_for_backward, which is for inputs and outputs; backward lets go of it.
            kept_middle = None if full or after else middle
            ctx.kept = _Saved(rows, attention, kept_middle, mlp, (attended, y if after else None))
        return layer.residual.add(middle, y, rows[1])

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

        middle, attention, (attended, y) = kept.middle, kept.attention, kept.outputs
        kept.middle, kept.outputs = None, (None, None)
        residual = layer.residual
        if layer.recompute == "full":
            middle, read, attention, attended = _attention_forward(
                layer, x, gains, tensors, positions, True, prefetch_mlp, adapters[0]
            )
        else:
            if middle is None:
                assert attended is not None
                middle = residual.add(x, attended, gains[0])
            read = residual.read(middle, gains[1])
        dy, finish = residual.backward(dout, middle, y, gains[1])
        del middle, y
        read, dy = _gathered(layer.tokens, read, dy, "mlp/tokens")
        dread, mlp_gradients, dadapters_mlp = layer.mlp.backward(
            dy, read, tensors.mlp, kept.mlp, prefetch_attention, adapters[1], frozen
        )
        dread = layer.tokens.reduce_scatter(dread, "mlp/tokens").wait()
        dmiddle, dgain_mlp = finish(dread)
        del finish, read, dy, dread

        dy, finish = residual.backward(dmiddle, x, attended, gains[0])
        del attended
        read, dy = _gathered(layer.tokens, residual.read(x, gains[0]), dy, "attention/tokens")
        dread, attention_gradients, dvectors, dadapters = layer.attention.backward(
            dy, read, tensors.attention, tensors.vectors, positions, attention, preceding, adapters[0],
            frozen, need_dx,
        )  # fmt: skip
        del read, dy
        dx, dgains = None, [dgain_mlp]
        if dread is not None:
            dread = layer.tokens.reduce_scatter(dread, "attention/tokens").wait()
            dx, dgain_attention = finish(dread)
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
) -> tuple[Tensor, Tensor, dict[int, SavedBucket], Tensor | None]:
    """x with attention's part added, what the MLP reads, and what the backward needs of attention.

    That is its buckets, and where outputs are kept its output, all in x's dtype.
    """
    read = layer.tokens.gather(layer.residual.read(x, gains[0]), "attention/tokens").wait()
    y, saved = layer.attention.forward(
        read, tensors.attention, tensors.vectors, positions, keep_projected, following, adapters
    )
    y = layer.tokens.reduce_scatter(y, "attention/tokens").wait()
    del read
    kept = y = y.to(x.dtype) if layer.residual.keeps_outputs else y
    middle, read = layer.residual.add_and_read(x, y, gains[0], gains[1])
    return middle, read, saved, kept if layer.residual.keeps_outputs else None


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
