"""Attention with streamed weights: forward and backward, one bucket of heads at a time.

Per bucket: q, k, v = x W_q^T, x W_k^T, x W_v^T; rotary by position in the document; attention over
the whole sequence; y += a W_o^T. y is summed in fp32 over buckets and belongs to local tokens
alone: nothing is all-reduced.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatsp.cp.documents import Documents
from megatsp.cp.sequence import SequenceAttention
from megatsp.schema import ModelConfig
from megatsp.tsp.buckets import Bucket, Columns
from megatsp.tsp.linear import Total
from megatsp.tsp.lora import NO_ADAPTERS, AdapterGradients, Adapters, AdaptersBackward, Spread
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

    def without_rotary(self) -> "Positions":
        """The same, for layers that turn nothing: all angles are 0."""
        return replace(self, cos=torch.ones_like(self.cos), sin=torch.zeros_like(self.sin))


@dataclass
class HeadVectors:
    """The small parameters of an attention layer, whole on every rank; None where the model has none.

    biases: of q, k and v, [H d], [K d], [K d]; gains: of the norms of q and k: [d] each, over each head, or
    [H d] and [K d], over all.
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
    """One layer's attention; `stream` brings its weights, `sequence` exchanges keys and values.

    Norms over all heads need them in one bucket: see tsp/attention_wide_norm.py.
    """

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
            y.add(rows_of(out), columns.pieces[3].t())
            low_out.add(rows_of(out), bucket)
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
        rows, drows = x.flatten(0, 1), dy.flatten(0, 1)
        dvectors = HeadVectors() if frozen else vectors.zeros()
        dx, gradients = Total(self._stream.steps), self._stream.gradients(weights, frozen)
        low = AdaptersBackward(adapters, rows, drows, 4, self._stream.steps)

        def use(step: int, bucket: Bucket, columns: Columns) -> None:
            kept = saved.pop(step)
            projected = kept.projected
            if projected is None:
                projected = self._project(rows, columns, bucket, vectors, low.low)
            projected = projected.view(*x.shape[:2], -1)
            dout = self._output_gradient(x.shape, drows, columns, bucket, low)
            dq, kv_gradients = self._sequence.backward(
                dout, *self._heads(projected, bucket, vectors, positions), kept.out, kept.lse,
                positions.documents,
            )  # fmt: skip
            dcolumns = gradients.buffer(step)
            # While the gradients of keys and values travel:
            dcolumns.set(3, 4, drows.t(), rows_of(kept.out))
            low.output(rows_of(kept.out), bucket)
            dheads = (dq, *kv_gradients())
            dprojected = self._heads_backward(dheads, projected, bucket, vectors, dvectors, positions)
            dprojected = dprojected.flatten(0, 1)
            dcolumns.set(0, 3, rows.t(), dprojected)
            gradients.send(step, dcolumns)
            low.projected(dprojected, bucket)
            if need_dx:
                dx.add_transposed(dprojected, columns.first(3))

        self._stream.walk(weights, use, following)
        if need_dx:
            low.add_to(dx)
        return dx.value(x.shape) if need_dx else None, gradients, dvectors, low.gradients()

    def _output_gradient(
        self, shape: Sequence[int], drows: Tensor, columns: Columns, bucket: Bucket, low: AdaptersBackward
    ) -> Tensor:
        """dy [B T/D, h] to the gradient of the bucket's heads, [B, H, T/D, d]; shape: of x."""
        dout = columns.times(drows, 3, 4)
        low.add_to_output(dout, bucket)
        return dout.view(*shape[:2], -1, self._head_width).transpose(1, 2)

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
        q, k, v = columns_of(projected, bucket)
        if vectors.gains:
            q, k = (
                self._norm.rms_norm(_groups(t, gain), gain, self._epsilon).flatten(-2)
                for t, gain in zip((q, k), vectors.gains, strict=True)
            )
        return self._rotated(q, k, v, positions)

    def _rotated(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Positions
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[B, T/D, columns] each to q [B, H, T/D, d] and k, v [B, K, T/D, d], q and k rotated."""
        q, k, v = (t.unflatten(-1, (-1, self._head_width)).transpose(1, 2) for t in (q, k, v))
        q, k = (self._rotate(t, positions.cos, positions.sin) for t in (q, k))
        return q, k, v

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
        gradient = self._rotated_backward(dheads, projected, bucket, positions)
        if vectors.gains:
            inputs, spans = columns_of(projected, bucket), columns_of(gradient, bucket)
            for i, gain in enumerate(vectors.gains):
                target = _groups(spans[i], gain)
                dinput, dgain = self._norm.rms_norm_backward(
                    target, _groups(inputs[i], gain), gain, self._epsilon
                )
                target.copy_(dinput)
                if dvectors.gains:
                    dvectors.gains[i].add_(dgain)
        add_bias_gradients(dvectors, gradient, bucket)
        return gradient

    def _rotated_backward(
        self, dheads: tuple[Tensor, Tensor, Tensor], like: Tensor, bucket: Bucket, positions: Positions
    ) -> Tensor:
        """Gradient of what `_rotated` was given, its columns side by side as in `like`, in its dtype."""
        gradient = torch.empty_like(like)
        dq, dk, dv = (
            t.unflatten(-1, (-1, self._head_width)).transpose(1, 2) for t in columns_of(gradient, bucket)
        )
        for target, dhead in ((dq, dheads[0]), (dk, dheads[1])):
            self._rotate(dhead, positions.cos, positions.sin, inverse=True, out=target)
        dv.copy_(dheads[2])
        return gradient


def add_bias_gradients(dvectors: HeadVectors, gradient: Tensor, bucket: Bucket) -> None:
    """Adds to the biases' gradients, if there are any, what the projected columns' gives them."""
    if dvectors.biases:
        for dbias, span, column in zip(
            dvectors.biases, bucket[:3], columns_of(gradient, bucket), strict=True
        ):
            dbias[span.start : span.stop] += column.sum((0, 1), dtype=torch.float32)


def columns_of(projected: Tensor, bucket: Bucket) -> tuple[Tensor, ...]:
    """The q, k and v columns of a bucket's projection [.., columns]."""
    return projected.split([s.width for s in bucket[:3]], -1)


def _groups(columns: Tensor, gain: Tensor) -> Tensor:
    """[.., n] to [.., n / m, m]: what is normalised together, by a gain [m] of one head or of all."""
    return columns.unflatten(-1, (-1, gain.numel()))


def rows_of(heads: Tensor) -> Tensor:
    """[B, H, T/D, d] to [B T/D, H d]."""
    return heads.transpose(1, 2).flatten(2).flatten(0, 1)
