"""Final norm, vocabulary head and cross-entropy, one bucket of vocabulary rows at a time.

The forward keeps an online log-sum-exp; the backward computes the logits again per bucket.
No logits larger than [B T/D, V/NB] exist.

Source: online softmax, Milakov & Gimelshein, arXiv:1805.02867.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatsp.tsp.buckets import Bucket, Span
from megatsp.tsp.linear import accumulate, product
from megatsp.tsp.norm import rms_norm, rms_norm_backward
from megatsp.tsp.small import SmallParameters
from megatsp.tsp.stream import WeightStream


class StreamedHead:
    """Sum of the masked next-token losses of the local tokens."""

    def __init__(self, stream: WeightStream, small: SmallParameters, epsilon: float) -> None:
        self.stream, self.small, self.epsilon = stream, small, epsilon

    def prefetch_forward(self, gain: Tensor, weight: Tensor) -> None:
        self.small.prefetch([gain])
        self.stream.prefetch([weight])

    def __call__(
        self,
        x: Tensor,
        labels: Tensor,
        mask: Tensor,
        gain: Tensor,
        weight: Tensor,
        preceding: Callable[[], None] | None,
    ) -> Tensor:
        """Losses of x [B, T/D, h] against labels [B, T/D] (int64), weighted by mask [B, T/D].

        gain: [h/D]; weight: [V, h/D]. preceding: posts what comes after this backward.
        Returns each token's weighted loss, fp32 [B, T/D].
        """
        return _Head.apply(x, labels, mask, gain, weight, self, preceding)


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        labels: Tensor,
        mask: Tensor,
        gain: Tensor,
        weight: Tensor,
        head: StreamedHead,
        preceding: Callable[[], None] | None,
    ) -> Tensor:
        gains = head.small.gains([gain])
        rows = rms_norm(x, gains[0], head.epsilon).flatten(0, 1)
        targets = labels.flatten()
        lse = torch.full(targets.shape, float("-inf"), dtype=torch.float32, device=x.device)
        target_logits = torch.zeros_like(lse)

        def use(step: int, bucket: Bucket, matrix: Tensor) -> None:
            logits = (rows @ matrix).float()
            torch.logaddexp(lse, logits.logsumexp(-1), out=lse)
            inside, column = _targets_inside(targets, bucket[0])
            target_logits.add_(logits.gather(1, column[:, None])[:, 0] * inside)

        head.stream.walk([weight], use)
        ctx.save_for_backward(x, targets, mask, gain, weight, gains, lse)
        ctx.head, ctx.preceding = head, preceding
        return (lse - target_logits).view_as(mask) * mask

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        x, targets, mask, gain, weight, gains, lse = ctx.saved_tensors
        head = ctx.head
        rows = rms_norm(x, gains[0], head.epsilon).flatten(0, 1)
        scale = (dloss * mask).flatten()[:, None]
        drows = torch.zeros(rows.shape, dtype=torch.float32, device=x.device)
        gradients = head.stream.gradients([weight])

        def use(step: int, bucket: Bucket, matrix: Tensor) -> None:
            # d loss / d logits = softmax - one_hot(target)
            dlogits = (rows @ matrix).float().sub_(lse[:, None]).exp_()
            inside, column = _targets_inside(targets, bucket[0])
            dlogits.scatter_add_(1, column[:, None], -inside.float()[:, None])
            dlogits = dlogits.mul_(scale).to(x.dtype)
            dmatrix = gradients.buffer(step)
            product(dmatrix, rows.t(), dlogits)
            gradients.send(step, dmatrix)
            accumulate(drows, dlogits, matrix.t())

        head.stream.walk([weight], use, ctx.preceding)
        dx, dgain = rms_norm_backward(drows.view(x.shape), x, gains[0], head.epsilon)
        (dweight,) = gradients.finish()
        (dgain,), _ = head.small.reduce([dgain], [])
        return dx.to(x.dtype), None, None, dgain.to(gain.dtype), dweight.to(weight.dtype), None, None


def _targets_inside(targets: Tensor, span: Span) -> tuple[Tensor, Tensor]:
    """Which targets fall into the span's rows, and their column there (0 for the others)."""
    inside = (targets >= span.start) & (targets < span.stop)
    return inside, torch.where(inside, targets - span.start, 0)
