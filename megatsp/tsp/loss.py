"""Cross-entropy of a vocabulary bucket, with the running log-sum-exp of the buckets before.

Source: online softmax, Milakov & Gimelshein, arXiv:1805.02867.
"""

from typing import Protocol

import torch
from megatsp_kernels.linear_cross_entropy import cross_entropy_backward_step, cross_entropy_step
from torch import Tensor

from megatsp.tsp.buckets import Columns, Span
from megatsp.tsp.linear import Total
from megatsp.tsp.transport import Gradients


class BucketLoss(Protocol):
    """rows: [n, h]; columns: one piece [h, m], the vocabulary's rows `span`; targets: int64 [n]."""

    def forward(
        self, rows: Tensor, columns: Columns, targets: Tensor, span: Span, lse: Tensor, target_logits: Tensor
    ) -> Tensor | None:
        """Widens `lse` and sets `target_logits` (fp32 [n], in place) by the bucket.

        Returns its logits, if they were computed as one tensor: the backward may be given them again.
        """

    def backward(
        self, rows: Tensor, columns: Columns, targets: Tensor, span: Span, lse: Tensor, scale: Tensor,
        logits: Tensor | None, drows: Total, gradients: Gradients, step: int,
    ) -> None:  # fmt: skip
        """Adds to drows, and sends the columns' gradient off (if it is wanted): those of scale [n] times each
        row's loss.

        lse: of all buckets. logits: as the forward returned them, or None.
        """


class TorchLoss:
    """A `BucketLoss` whose logits [n, m] exist, one bucket at a time."""

    def forward(
        self, rows: Tensor, columns: Columns, targets: Tensor, span: Span, lse: Tensor, target_logits: Tensor
    ) -> Tensor | None:
        kept = rows @ columns.pieces[0]
        logits = kept.float()
        torch.logaddexp(lse, logits.logsumexp(-1), out=lse)
        inside, column = _targets_inside(targets, span)
        target_logits.add_(logits.gather(1, column[:, None])[:, 0] * inside)
        return kept

    def backward(
        self, rows: Tensor, columns: Columns, targets: Tensor, span: Span, lse: Tensor, scale: Tensor,
        logits: Tensor | None, drows: Total, gradients: Gradients, step: int,
    ) -> None:  # fmt: skip
        # d loss / d logits = softmax - one_hot(target)
        logits = (rows @ columns.pieces[0] if logits is None else logits).float()
        dlogits = logits.sub_(lse[:, None]).exp_()
        inside, column = _targets_inside(targets, span)
        dlogits.scatter_add_(1, column[:, None], -inside.float()[:, None])
        dlogits = dlogits.mul_(scale[:, None]).to(rows.dtype)
        dcolumns = gradients.buffer(step)
        dcolumns.set(0, 1, rows.t(), dlogits)
        gradients.send(step, dcolumns)
        drows.add(dlogits, columns.pieces[0].t())


class TritonLoss:
    """A `BucketLoss` that never writes logits."""

    def forward(
        self, rows: Tensor, columns: Columns, targets: Tensor, span: Span, lse: Tensor, target_logits: Tensor
    ) -> Tensor | None:
        cross_entropy_step(rows, columns.pieces[0], targets, span.start, lse, target_logits)
        return None

    def backward(
        self, rows: Tensor, columns: Columns, targets: Tensor, span: Span, lse: Tensor, scale: Tensor,
        logits: Tensor | None, drows: Total, gradients: Gradients, step: int,
    ) -> None:  # fmt: skip
        assert logits is None
        dcolumns = gradients.buffer(step)

        def add(dx: Tensor | None) -> Tensor:
            dw = dcolumns.pieces[0] if dcolumns.wanted else None
            dx, _ = cross_entropy_backward_step(
                rows, columns.pieces[0], targets, span.start, lse, scale, scale, dx, dw,
                need_dw=dcolumns.wanted,
            )  # fmt: skip
            return dx

        drows.add_by(add)
        gradients.send(step, dcolumns)


def _targets_inside(targets: Tensor, span: Span) -> tuple[Tensor, Tensor]:
    """Which targets fall into the span's rows, and their column there (0 for the others)."""
    inside = (targets >= span.start) & (targets < span.stop)
    return inside, torch.where(inside, targets - span.start, 0)
