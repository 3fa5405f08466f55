"""Final norm, vocabulary head and cross-entropy, one bucket of vocabulary rows at a time.

The forward keeps an online log-sum-exp; the backward computes the logits again per bucket, unless
there is but one and nothing is to be computed again. No logits larger than [B T/D, V/NB] exist.

Source: online softmax, Milakov & Gimelshein, arXiv:1805.02867.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatsp.tp.tokens import GroupTokens
from megatsp.tsp.attention import HeadVectors
from megatsp.tsp.buckets import Bucket, Columns
from megatsp.tsp.linear import Total
from megatsp.tsp.operations import Kernels
from megatsp.tsp.small import Small
from megatsp.tsp.stream import WeightStream


class StreamedHead:
    """The masked next-token losses of the local tokens.

    tokens: the tp group, of which this rank holds the vocabulary's rows from `first_row`. keep: the
    backward finds the logits of a single bucket kept, if the kernel has any.
    """

    def __init__(
        self,
        stream: WeightStream,
        small: Small,
        tokens: GroupTokens,
        first_row: int,
        kernels: Kernels,
        epsilon: float,
        keep: bool,
    ) -> None:
        self.stream, self.small, self.tokens = stream, small, tokens
        self.norm, self.loss = kernels.norm, kernels.loss
        self.first_row, self.epsilon, self.keep = first_row, epsilon, keep and stream.steps == 1

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

        gain: [h/D]; weight: [V, h/D] or [V/tp, h]. preceding: posts what comes after this backward.
        Returns each token's weighted loss, fp32 [B, T/D].
        """
        return _Head.apply(x, labels, mask, gain, weight, self, preceding, torch.is_grad_enabled())


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
        grad: bool,
    ) -> Tensor:
        gains = head.small.gains([gain])
        rows = _normalised(x, gains, head).flatten(0, 1)
        targets = head.tokens.gather(labels, "head/labels").wait().flatten() - head.first_row
        lse = torch.full(targets.shape, float("-inf"), dtype=torch.float32, device=x.device)
        target_logits = torch.zeros_like(lse)
        kept: dict[int, Tensor] = {}

        def use(step: int, bucket: Bucket, columns: Columns) -> None:
            logits = head.loss.forward(rows, columns, targets, bucket[0], lse, target_logits)
            if head.keep and grad and logits is not None:
                kept[step] = logits

        head.stream.walk([weight], use)
        lse, target_logits = head.tokens.combine(lse, target_logits)
        ctx.save_for_backward(x, targets, mask, gain, weight, gains, lse)
        ctx.head, ctx.preceding, ctx.kept = head, preceding, kept
        return head.tokens.own((lse - target_logits).view(x.shape[0], -1)) * mask

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        x, targets, mask, gain, weight, gains, lse = ctx.saved_tensors
        head, kept, ctx.kept = ctx.head, ctx.kept, None
        rows = _normalised(x, gains, head).flatten(0, 1)
        scale = head.tokens.gather(dloss * mask, "head/loss").wait().flatten()
        _, _, _, train_gain, train_weight, *_ = ctx.needs_input_grad
        drows = Total(head.stream.steps)
        gradients = head.stream.gradients([weight], frozen=not train_weight)

        def use(step: int, bucket: Bucket, columns: Columns) -> None:
            logits = kept.pop(step, None)
            head.loss.backward(rows, columns, targets, bucket[0], lse, scale, logits, drows, gradients, step)

        head.stream.walk([weight], use, ctx.preceding)
        partial = drows.value((x.shape[0], -1, x.shape[2]))
        dnormed = head.tokens.reduce_scatter(partial, "head/backward").wait()
        dx, dgain = head.norm.rms_norm_backward(dnormed, x, gains[0], head.epsilon)
        small = head.small.reduce([dgain], HeadVectors()) if train_gain else None
        (dweight,) = gradients.finish()
        dgain = None if small is None else small()[0][0].to(gain.dtype)
        dweight = None if dweight is None else dweight.to(weight.dtype)
        return dx.to(x.dtype), None, None, dgain, dweight, None, None, None


def _normalised(x: Tensor, gains: Tensor, head: StreamedHead) -> Tensor:
    """norm(x) of all tokens of the group: [B, T/D tp, h]."""
    return head.tokens.gather(head.norm.rms_norm(x, gains[0], head.epsilon), "head/tokens").wait()
