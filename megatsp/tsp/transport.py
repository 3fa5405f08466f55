"""How a bucket reaches every rank, and how its gradient gets home.

A transport serves one `Part` on one group. It knows who holds what; those who compute with
the buckets do not. Steps are counted from 0; at step s every rank has SOME bucket, and only
on the ring is it another one on each rank.

`weights` is always this rank's shards, in the order of the part's matrices; what arrives are
the bucket's `Columns` in the compute dtype. Gradients are given as `Columns` and end as tensors
like the shards: in fp32 where ranks add to them, in the shards' dtype where nothing travels.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from megatsp.comm import Comm, Pending
from megatsp.tsp.buckets import Bucket, Columns, Part, h_major, width


class Gradients(Protocol):
    """Collects the bucket gradients of one backward pass."""

    def buffer(self, step: int) -> Columns:
        """Uninitialised columns for this step's gradient."""

    def send(self, step: int, gradient: Columns) -> None:
        """Posts a gradient written into `buffer(step)`. One is in flight at a time."""

    def finish(self) -> Sequence[Tensor | None]:
        """Waits for the last one; this rank's gradient shards. None: the weights are frozen."""


class FrozenGradients:
    """`Gradients` of weights that are not trained: no product is computed, nothing is kept or sent."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self._count = len(weights)

    def buffer(self, step: int) -> Columns:
        del step
        return _Nowhere([])

    def send(self, step: int, gradient: Columns) -> None:
        """There is none."""

    def finish(self) -> list[None]:
        return [None] * self._count


class _Nowhere(Columns):
    """Columns that nobody asks for."""

    wanted = False

    def set(self, start: int, stop: int, a: Tensor, b: Tensor) -> None:
        """Computes nothing."""


class Transport(Protocol):
    """How the buckets of `part` travel."""

    part: Part
    steps: int

    def bucket(self, step: int) -> int:
        """Index of the bucket that this rank has at `step`."""

    def post(self, step: int, weights: Sequence[Tensor], previous: Tensor | None) -> Pending:
        """Posts the transfer of this step's bucket; `previous` is what arrived for the last step."""

    def columns(self, step: int, weights: Sequence[Tensor], arrived: Tensor) -> Columns:
        """The bucket, once its transfer has arrived."""

    def gradients(self, weights: Sequence[Tensor]) -> Gradients: ...


class SideBySide:
    """Base of the transports that move a bucket as one tensor."""

    part: Part

    def bucket(self, step: int) -> int:
        return step

    def columns(self, step: int, weights: Sequence[Tensor], arrived: Tensor) -> Columns:
        del weights
        return Columns.of(arrived, self.part.buckets[self.bucket(step)])


class Resident:
    """A group of one: every column is here. Nothing travels, and nothing is copied but to cast it."""

    def __init__(self, part: Part, dtype: torch.dtype) -> None:
        self.part, self.dtype = part, dtype
        self.steps = len(part.buckets)

    def bucket(self, step: int) -> int:
        return step

    def post(self, step: int, weights: Sequence[Tensor], previous: Tensor | None) -> Pending:
        del step, previous
        return Pending(weights[0])

    def columns(self, step: int, weights: Sequence[Tensor], arrived: Tensor) -> Columns:
        del arrived
        return Columns([piece.to(self.dtype) for piece in self.part.views(step, weights)])

    def gradients(self, weights: Sequence[Tensor]) -> Gradients:
        return _ResidentGradients(self.part, weights)


class _ResidentGradients:
    def __init__(self, part: Part, weights: Sequence[Tensor]) -> None:
        self._part = part
        self._whole = [torch.empty_like(w) for w in weights]

    def buffer(self, step: int) -> Columns:
        return Columns(self._part.views(step, self._whole))

    def send(self, step: int, gradient: Columns) -> None:
        """It was written where it stays."""

    def finish(self) -> list[Tensor]:
        return self._whole


class Gather(SideBySide):
    """Layout `hidden`: rank p holds rows p of every h-major matrix.

    A bucket is ONE all-gather: the ranks' [h/D, R] blocks land in rank order, which is the
    bucket itself. Its gradient is one reduce-scatter of [h, R].
    """

    def __init__(self, part: Part, comm: Comm, dtype: torch.dtype) -> None:
        self.part, self.comm, self.dtype = part, comm, dtype
        self.steps = len(part.buckets)

    def post(self, step: int, weights: Sequence[Tensor], previous: Tensor | None) -> Pending:
        del previous
        columns = self.part.views(step, weights)
        rows = columns[0].shape[0]
        block = columns[0].new_empty(rows, width(self.part.buckets[step]), dtype=self.dtype)
        for target, source in zip(block.split([c.shape[1] for c in columns], 1), columns, strict=True):
            target.copy_(source)
        return self.comm.all_gather(block, f"{self.part.label}/weights")

    def gradients(self, weights: Sequence[Tensor]) -> Gradients:
        return _GatherGradients(self, weights)


class _GatherGradients:
    def __init__(self, transport: Gather, weights: Sequence[Tensor]) -> None:
        self._transport = transport
        self._shards = [torch.empty_like(w, dtype=torch.float32) for w in weights]
        self._in_flight: tuple[Bucket, Pending] | None = None
        views = zip(self._shards, transport.part.matrices, strict=True)
        self._views = [h_major(shard, matrix) for shard, matrix in views]

    def buffer(self, step: int) -> Columns:
        bucket, rows = self._transport.part.buckets[step], self._views[0].shape[0] * self._transport.comm.size
        return Columns.of(self._views[0].new_empty(rows, width(bucket)), bucket)

    def send(self, step: int, gradient: Columns) -> None:
        self._land()
        assert gradient.whole is not None
        label = f"{self._transport.part.label}/gradients"
        self._in_flight = (
            self._transport.part.buckets[step],
            self._transport.comm.reduce_scatter(gradient.whole, label),
        )

    def _land(self) -> None:
        if self._in_flight is None:
            return
        bucket, pending = self._in_flight
        for span, columns in zip(bucket, pending.wait().split([s.width for s in bucket], 1), strict=True):
            self._views[span.matrix][:, span.start : span.stop] = columns
        self._in_flight = None

    def finish(self) -> list[Tensor]:
        self._land()
        return self._shards
