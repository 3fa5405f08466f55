"""Attention with RMSNorms of q and k over all heads, which lie in several buckets (OLMo 2).

A token's mean square is known when its last bucket is projected, so the forward walks the weights twice: it
projects all buckets, then attends with each. The backward's norms need a sum over all heads likewise: it
first takes each bucket back to the normalised q and k, then through the norms and projections. Kept between
the two walks: the projections of all buckets, [B T/D, (H + 2 K) d], and in the backward also their
gradients. A single bucket needs none of this: see StreamedAttention, which then has all heads at hand. The
norms are torch's here: no kernel of Norm's takes a part of what is normalised.

Source: OLMo 2, arXiv:2501.00656, section 3.1; the norm's backward is that of tsp/norm.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatsp.tsp.attention import (
    HeadVectors,
    Positions,
    SavedBucket,
    StreamedAttention,
    add_bias_gradients,
    columns_of,
    rows_of,
)
from megatsp.tsp.buckets import Bucket, Columns
from megatsp.tsp.linear import Total
from megatsp.tsp.lora import NO_ADAPTERS, AdapterGradients, Adapters, AdaptersBackward
from megatsp.tsp.transport import Gradients

Use = Callable[[int, Bucket, Columns], None]


@dataclass
class SavedWideBucket(SavedBucket):
    """Also 1 / rms of all heads' q and of all k, fp32 [B, T/D, 1]: the same two tensors in every bucket."""

    inverse: tuple[Tensor, Tensor]


class WideNormAttention(StreamedAttention):
    """As StreamedAttention, for norms over more heads than one bucket has. `vectors.gains`: [H d], [K d]."""

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
        """See StreamedAttention."""
        rows, y = x.flatten(0, 1), Total(self._stream.steps)
        low, low_out = adapters.spread(rows, 0, 3), adapters.collect(3, 4, self._stream.steps)
        squares, projections = _per_token(x), {}
        saved: dict[int, SavedBucket] = {}

        def project(step: int, bucket: Bucket, columns: Columns) -> None:
            projected = self._project(rows, columns, bucket, vectors, low).view(*x.shape[:2], -1)
            for total, t in zip(squares, columns_of(projected, bucket), strict=False):
                total += torch.linalg.vector_norm(t, dim=-1, keepdim=True, dtype=torch.float32).square_()
            projections[step] = projected

        def attend(step: int, bucket: Bucket, columns: Columns) -> None:
            projected = projections.pop(step)
            q, k, v = self._normed_heads(projected, bucket, vectors, inverse, positions)
            out, lse = self._sequence.forward(q, k, v, positions.documents)
            y.add(rows_of(out), columns.pieces[3].t())
            low_out.add(rows_of(out), bucket)
            kept = projected.flatten(0, 1) if keep_projected else None
            saved[step] = SavedWideBucket(out, lse, kept, inverse)

        self._stream.walk(weights, project, lambda: self._stream.prefetch(weights))
        inverse = self._inverse_rms(squares, _gains(vectors))
        self._stream.walk(weights, attend, following)
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
        """See StreamedAttention."""
        rows, drows = x.flatten(0, 1), dy.flatten(0, 1)
        dvectors = HeadVectors() if frozen else vectors.zeros()
        dx, gradients = Total(self._stream.steps), self._stream.gradients(weights, frozen)
        low = AdaptersBackward(adapters, rows, drows, 4, self._stream.steps)
        # Of each token, the sum over all heads of gradient times gain times projection.
        products = _per_token(x)
        # By step: out, projections, and gradients: of the normalised q and k, and of v.
        halfway: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

        def attend(step: int, bucket: Bucket, columns: Columns) -> None:
            kept = saved.pop(step)
            assert isinstance(kept, SavedWideBucket)
            projected = kept.projected
            if projected is None:
                projected = self._project(rows, columns, bucket, vectors, low.low)
            projected = projected.view(*x.shape[:2], -1)
            heads = self._normed_heads(projected, bucket, vectors, kept.inverse, positions)
            dout = self._output_gradient(x.shape, drows, columns, bucket, low)
            dq, kv_gradients = self._sequence.backward(dout, *heads, kept.out, kept.lse, positions.documents)
            gradient = self._rotated_backward((dq, *kv_gradients()), projected, bucket, positions)
            pairs = zip(columns_of(gradient, bucket), columns_of(projected, bucket), strict=True)
            for total, span, gain, (d, t) in zip(products, bucket, _gains(vectors), pairs, strict=False):
                total += ((d.float() * t) @ gain[span.start : span.stop].float())[..., None]
            halfway[step] = kept.out, projected, gradient

        def project(step: int, bucket: Bucket, columns: Columns) -> None:
            out, projected, gradient = halfway.pop(step)
            self._norm_backward(gradient, projected, bucket, vectors, dvectors, inverse, products)
            add_bias_gradients(dvectors, gradient, bucket)
            gradient = gradient.flatten(0, 1)
            dcolumns = gradients.buffer(step)
            dcolumns.set(3, 4, drows.t(), rows_of(out))
            dcolumns.set(0, 3, rows.t(), gradient)
            gradients.send(step, dcolumns)
            low.output(rows_of(out), bucket)
            low.projected(gradient, bucket)
            if need_dx:
                dx.add_transposed(gradient, columns.first(3))

        first = next(iter(saved.values()))
        assert isinstance(first, SavedWideBucket)
        inverse = first.inverse
        del first
        self._stream.walk(weights, attend, lambda: self._stream.prefetch(weights))
        self._stream.walk(weights, project, following)
        if need_dx:
            low.add_to(dx)
        return dx.value(x.shape) if need_dx else None, gradients, dvectors, low.gradients()

    def _inverse_rms(self, squares: Sequence[Tensor], gains: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """From each token's sum of squares of q and of k to 1 / rms, fp32 [B, T/D, 1]."""
        q, k = (
            (total / gain.numel() + self._epsilon).rsqrt() for total, gain in zip(squares, gains, strict=True)
        )
        return q, k

    def _normed_heads(
        self,
        projected: Tensor,
        bucket: Bucket,
        vectors: HeadVectors,
        inverse: tuple[Tensor, Tensor],
        positions: Positions,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `_heads`, q and k normalised by what is known of all heads."""
        q, k, v = columns_of(projected, bucket)
        q, k = (
            (t * scale).to(t.dtype).mul_(gain[span.start : span.stop].to(t.dtype))
            for t, scale, gain, span in zip((q, k), inverse, _gains(vectors), bucket, strict=False)
        )
        return self._rotated(q, k, v, positions)

    def _norm_backward(
        self,
        gradient: Tensor,
        projected: Tensor,
        bucket: Bucket,
        vectors: HeadVectors,
        dvectors: HeadVectors,
        inverse: tuple[Tensor, Tensor],
        products: Sequence[Tensor],
    ) -> None:
        """Turns the gradients of normalised q and k into those of the projections; adds those of gains."""
        # With r = 1 / rms: dx = r dy gain - x r^3 <dy gain, x> / n, and dgain = sum of r dy x.
        targets, inputs = columns_of(gradient, bucket), columns_of(projected, bucket)
        for i, gain in enumerate(_gains(vectors)):
            span, r, d, t = bucket[i], inverse[i], targets[i].float(), inputs[i].float()
            if dvectors.gains:
                dvectors.gains[i][span.start : span.stop] += (d * t * r).sum((0, 1))
            d = d * gain[span.start : span.stop].float() * r
            targets[i].copy_(d.addcmul_(t, products[i] * r**3 / gain.numel(), value=-1))


def _gains(vectors: HeadVectors) -> tuple[Tensor, Tensor]:
    assert vectors.gains is not None
    return vectors.gains


def _per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """Fp32 zeros [B, T/D, 1], of q and of k, to add to."""
    return tuple(x.new_zeros(*x.shape[:2], 1, dtype=torch.float32) for _ in range(2))  # type: ignore[return-value]
