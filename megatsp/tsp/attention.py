"""Attention with streamed weights: forward and backward, one bucket of heads at a time.

Per bucket: q, k, v = x W_q^T, x W_k^T, x W_v^T; rotary by position in the document; attention over
the whole sequence; y += a W_o^T. y is summed in fp32 over buckets and belongs to local tokens
alone: nothing is all-reduced.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatsp.cp.documents import Documents
from megatsp.cp.sequence import SequenceAttention
from megatsp.schema import ModelConfig
from megatsp.tsp.buckets import Bucket, Columns
from megatsp.tsp.linear import Total
from megatsp.tsp.lora import NO_ADAPTERS, AdapterGradients, Adapters, Spread
from megatsp.tsp.operations import Kernels
from megatsp.tsp.stream import WeightStream
from megatsp.tsp.transport import Gradients


@dataclass(frozen=True)
class Positions:
    """Where the tokens of a batch stand, as attention needs to know it.

    cos, sin: of each token's position in its document: fp32 [T/D, d/2], or [B, 1, T/D, d/2] where samples
    differ. documents: None: a sample is one.
    """

    cos: Tensor
    sin: Tensor
    documents: Documents | None


@dataclass
class HeadVectors:
    """The small parameters of an attention layer, whole on every rank; None where the model has none.

    biases: of q, k and v, [H d], [K d], [K d]; gains: of the norms of q and k heads, [d] each.
    """

    biases: tuple[Tensor, Tensor, Tensor] | None = None
    gains: tuple[Tensor, Tensor] | None = None

    def zeros(self) -> "HeadVectors":
        """Fp32 zeros of the same shapes, to add gradients to."""
        return HeadVectors.of(
            [torch.zeros_like(t, dtype=torch.float32) for t in self.tensors()], *self.present
        )

    @property
    def present(self) -> tuple[bool, bool]:
        """Whether there are biases, and whether there are gains."""
        return self.biases is not None, self.gains is not None

    def tensors(self) -> list[Tensor]:
        return [*(self.biases or ()), *(self.gains or ())]

    @classmethod
    def of(cls, tensors: Sequence[Tensor], biased: bool, head_normed: bool) -> "HeadVectors":
        """The inverse of `tensors`, given what is `present`."""
        rest = list(tensors)
        biases = (rest.pop(0), rest.pop(0), rest.pop(0)) if biased else None
        return cls(biases, (rest.pop(0), rest.pop(0)) if head_normed else None)


@dataclass
class SavedBucket:
    """What the forward keeps of one bucket; `projected` only if it is not computed again."""

    out: Tensor  # [B, H_bucket, T/D, d]
    lse: Tensor  # [B, H_bucket, T/D]
    projected: Tensor | None  # q, k, v before norm and rotary: [B T/D, columns]


class StreamedAttention:
    """One layer's attention; `stream` brings its weights, `sequence` exchanges keys and values."""

    def __init__(
        self, model: ModelConfig, stream: WeightStream, sequence: SequenceAttention, kernels: Kernels
    ) -> None:
        self._stream, self._sequence, self._norm = stream, sequence, kernels.norm
        self._rotate = kernels.rotary.rotate
        self._head_width, self._epsilon = model.kv_channels, model.norm_epsilon

    def prefetch(self, weights: Sequence[Tensor]) -> None:
        self._stream.prefetch(weights)

    def forward(
        self,
        x: Tensor,
        weights: Sequence[Tensor],
        vectors: HeadVectors,
        positions: Positions,
        keep_projected: bool,
        following: Callable[[], None] | None,
        adapters: Adapters = NO_ADAPTERS,
    ) -> tuple[Tensor, dict[int, SavedBucket]]:
        """x: [B, T/D, h], normalised. Returns y like x (see `Total`), and what backward needs, by step."""
        rows, y, saved = x.flatten(0, 1), Total(self._stream.steps), {}
        low, low_out = adapters.spread(rows, 0, 3), adapters.collect(3, 4, self._stream.steps)

        def use(step: int, bucket: Bucket, columns: Columns) -> None:
            projected = self._project(rows, columns, bucket, vectors, low)
            q, k, v = self._heads(projected.view(*x.shape[:2], -1), bucket, vectors, positions)
            out, lse = self._sequence.forward(q, k, v, positions.documents)
            y.add(_rows(out), columns.pieces[3].t())
            low_out.add(_rows(out), bucket)
            saved[step] = SavedBucket(out, lse, projected if keep_projected else None)

        self._stream.walk(weights, use, following)
        low_out.add_to(y)
        return y.value(x.shape), saved

    def backward(
        self,
        dy: Tensor,
        x: Tensor,
        weights: Sequence[Tensor],
        vectors: HeadVectors,
        positions: Positions,
        saved: dict[int, SavedBucket],
        following: Callable[[], None] | None,
        adapters: Adapters = NO_ADAPTERS,
        frozen: bool = False,
        need_dx: bool = True,
    ) -> tuple[Tensor | None, Gradients, HeadVectors, AdapterGradients]:
        """dy: [B, T/D, h] in the compute dtype. Empties `saved` as it goes.

        Returns dx (see `Total`; None if not needed), the weight gradients (the last bucket's still on its
        way: see `Gradients.finish`), and the LOCAL tokens' share of the vectors' and adapters' gradients.
        Frozen weights and vectors have no gradients.
        """
        steps = self._stream.steps
        rows, drows = x.flatten(0, 1), dy.flatten(0, 1)
        dvectors = HeadVectors() if frozen else vectors.zeros()
        dx, gradients = Total(steps), self._stream.gradients(weights, frozen)
        low, dlow_out = adapters.spread(rows, 0, 3), adapters.spread(drows, 3, 4)
        dlow, low_out = adapters.collect(0, 3, steps), adapters.collect(3, 4, steps)

        def use(step: int, bucket: Bucket, columns: Columns) -> None:
            kept = saved.pop(step)
            projected = kept.projected
            if projected is None:
                projected = self._project(rows, columns, bucket, vectors, low)
            projected = projected.view(*x.shape[:2], -1)
            dout_rows = columns.times(drows, 3, 4)
            dlow_out.add_to(dout_rows, bucket)
            dout = dout_rows.view(*x.shape[:2], -1, self._head_width).transpose(1, 2)
            dq, kv_gradients = self._sequence.backward(
                dout, *self._heads(projected, bucket, vectors, positions), kept.out, kept.lse,
                positions.documents,
            )  # fmt: skip
            dcolumns = gradients.buffer(step)
            # While the gradients of keys and values travel:
            dcolumns.set(3, 4, drows.t(), _rows(kept.out))
            low_out.add(_rows(kept.out), bucket)
            dlow_out.learn(_rows(kept.out), bucket)
            dheads = (dq, *kv_gradients())
            dprojected = self._heads_backward(dheads, projected, bucket, vectors, dvectors, positions)
            dprojected = dprojected.flatten(0, 1)
            dcolumns.set(0, 3, rows.t(), dprojected)
            gradients.send(step, dcolumns)
            dlow.add(dprojected, bucket)
            low.learn(dprojected, bucket)
            if need_dx:
                dx.add_transposed(dprojected, columns.first(3))

        self._stream.walk(weights, use, following)
        if need_dx:
            dlow.add_to(dx)
        dadapters = AdapterGradients(
            [*dlow.outer_gradients(rows), *low_out.outer_gradients(drows)],
            [*low.inner_gradients(), *dlow_out.inner_gradients()],
        )
        return dx.value(x.shape) if need_dx else None, gradients, dvectors, dadapters

    def _project(
        self, rows: Tensor, columns: Columns, bucket: Bucket, vectors: HeadVectors, low: Spread
    ) -> Tensor:
        """[B T/D, h] to the bucket's q, k and v columns, side by side."""
        projected = columns.times(rows, 0, 3)
        low.add_to(projected, bucket)
        if vectors.biases:
            biases = [b[s.start : s.stop] for b, s in zip(vectors.biases, bucket[:3], strict=True)]
            projected += torch.cat(biases).to(projected.dtype)
        return projected

    def _heads(
        self, projected: Tensor, bucket: Bucket, vectors: HeadVectors, positions: Positions
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[B, T/D, columns] to q [B, H, T/D, d] and k, v [B, K, T/D, d], normalised and rotated."""
        q, k, v = (t.unflatten(-1, (-1, self._head_width)) for t in _columns(projected, bucket))
        if vectors.gains:
            q, k = (
                self._norm.rms_norm(t, g, self._epsilon) for t, g in zip((q, k), vectors.gains, strict=True)
            )
        q, k = (self._rotate(t.transpose(1, 2), positions.cos, positions.sin) for t in (q, k))
        return q, k, v.transpose(1, 2)

    def _heads_backward(
        self,
        dheads: tuple[Tensor, Tensor, Tensor],
        projected: Tensor,
        bucket: Bucket,
        vectors: HeadVectors,
        dvectors: HeadVectors,
        positions: Positions,
    ) -> Tensor:
        """Gradient of the projected columns [B, T/D, columns] in their dtype; adds to `dvectors`."""
        gradient = torch.empty_like(projected)
        spans = [t.unflatten(-1, (-1, self._head_width)) for t in _columns(gradient, bucket)]
        dq, dk, dv = dheads
        for target, dhead in zip(spans, (dq, dk), strict=False):
            self._rotate(dhead, positions.cos, positions.sin, inverse=True, out=target.transpose(1, 2))
        spans[2].copy_(dv.transpose(1, 2))
        if vectors.gains:
            inputs = _columns(projected, bucket)
            for i, gain in enumerate(vectors.gains):
                heads = inputs[i].unflatten(-1, (-1, self._head_width))
                dhead, dgain = self._norm.rms_norm_backward(spans[i], heads, gain, self._epsilon)
                spans[i].copy_(dhead)
                if dvectors.gains:
                    dvectors.gains[i].add_(dgain)
        if dvectors.biases:
            for dbias, span, column in zip(
                dvectors.biases, bucket[:3], _columns(gradient, bucket), strict=True
            ):
                dbias[span.start : span.stop] += column.sum((0, 1), dtype=torch.float32)
        return gradient


def _columns(projected: Tensor, bucket: Bucket) -> tuple[Tensor, ...]:
    return projected.split([s.width for s in bucket[:3]], -1)


def _rows(heads: Tensor) -> Tensor:
    """[B, H, T/D, d] to [B T/D, H d]."""
    return heads.transpose(1, 2).flatten(2).flatten(0, 1)
