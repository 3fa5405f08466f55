"""How the buckets of the `owner` layout travel: by broadcasts, or round a ring.

Rank r holds columns r of every h-major matrix, as DTensor's Shard cuts them. A bucket lies in
memory as its rows, [R, h], so that an owner's columns are contiguous.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatsp.comm import Comm, Pending, TravellingSum
from megatsp.tsp.buckets import Bucket, Columns, Part, Span, h_major, width
from megatsp.tsp.transport import Gradients, SideBySide


class _OwnerTable:
    """Whose a column is, and reading and writing this rank's own."""

    def __init__(self, part: Part, comm: Comm) -> None:
        self._part, self._rank = part, comm.rank
        self._chunks = [-(-matrix.columns // comm.size) for matrix in part.matrices]

    def by_owner(self, span: Span) -> list[tuple[int, Span]]:
        """The span cut where the owner changes, in order."""
        chunk, pieces, start = self._chunks[span.matrix], [], span.start
        while start < span.stop:
            owner = start // chunk
            stop = min(span.stop, (owner + 1) * chunk)
            pieces.append((owner, Span(span.matrix, start, stop)))
            start = stop
        return pieces

    def new_rows(self, like: Sequence[Tensor], bucket: Bucket, dtype: torch.dtype) -> Tensor:
        """An uninitialised [R, h]; `like`: the shards, for h and the device."""
        h = like[0].shape[self._part.matrices[0].h_dim]
        return like[0].new_empty(width(bucket), h, dtype=dtype)

    def read(self, shards: Sequence[Tensor], spans: Sequence[Span], rows: Tensor) -> None:
        """Fills `rows` with these spans of this rank's own shards."""
        for span, target in zip(spans, rows.split([s.width for s in spans]), strict=True):
            target.copy_(self._own(shards, span))

    def write(self, shards: Sequence[Tensor], spans: Sequence[Span], rows: Tensor) -> None:
        """Puts `rows` into these spans of this rank's own shards."""
        for span, source in zip(spans, rows.split([s.width for s in spans]), strict=True):
            self._own(shards, span).copy_(source)

    def _own(self, shards: Sequence[Tensor], span: Span) -> Tensor:
        """This rank's own piece, as [columns, h]."""
        first = self._rank * self._chunks[span.matrix]
        whole = h_major(shards[span.matrix], self._part.matrices[span.matrix])
        return whole[:, span.start - first : span.stop - first].t()


class Broadcast(SideBySide):
    """Layout `owner`, any number of buckets: each owner broadcasts its pieces of the bucket.

    Where buckets and owners coincide it is one broadcast; a piece cut by the borders of shards
    costs one more. The gradient goes home by reductions to the same owners.
    """

    def __init__(self, part: Part, comm: Comm, dtype: torch.dtype) -> None:
        self.part, self.comm, self.dtype = part, comm, dtype
        self.steps = len(part.buckets)
        self.table = _OwnerTable(part, comm)

    def pieces(self, step: int) -> list[tuple[int, int, int, list[Span]]]:
        """(owner, first row, last row + 1, spans): neighbours of one owner are one piece."""
        merged: list[tuple[int, int, int, list[Span]]] = []
        row = 0
        for owner, span in (p for s in self.part.buckets[step] for p in self.table.by_owner(s)):
            if merged and merged[-1][0] == owner:
                _, start, _, spans = merged.pop()
                merged.append((owner, start, row + span.width, [*spans, span]))
            else:
                merged.append((owner, row, row + span.width, [span]))
            row += span.width
        return merged

    def post(self, step: int, weights: Sequence[Tensor], previous: Tensor | None) -> Pending:
        del previous
        rows = self.table.new_rows(weights, self.part.buckets[step], self.dtype)
        works = []
        for owner, start, stop, spans in self.pieces(step):
            if owner == self.comm.rank:
                self.table.read(weights, spans, rows[start:stop])
            if self.comm.size > 1:
                works.append(self.comm.broadcast(rows[start:stop], owner, f"{self.part.label}/weights"))
        return Pending(rows.t(), works, self.comm.traffic, [rows])

    def gradients(self, weights: Sequence[Tensor]) -> Gradients:
        return _BroadcastGradients(self, weights)


class _BroadcastGradients:
    def __init__(self, transport: Broadcast, weights: Sequence[Tensor]) -> None:
        self._transport = transport
        self._shards = [torch.empty_like(w, dtype=torch.float32) for w in weights]
        self._in_flight: tuple[int, Pending] | None = None

    def buffer(self, step: int) -> Columns:
        bucket = self._transport.part.buckets[step]
        return Columns.of(self._transport.table.new_rows(self._shards, bucket, torch.float32).t(), bucket)

    def send(self, step: int, gradient: Columns) -> None:
        self._land()
        assert gradient.whole is not None
        rows, comm = gradient.whole.t(), self._transport.comm
        works = []
        if comm.size > 1:
            label = f"{self._transport.part.label}/gradients"
            for owner, start, stop, _ in self._transport.pieces(step):
                works.append(comm.reduce(rows[start:stop], owner, label))
        self._in_flight = step, Pending(rows, works, comm.traffic)

    def _land(self) -> None:
        if self._in_flight is None:
            return
        step, pending = self._in_flight
        rows = pending.wait()
        for owner, start, stop, spans in self._transport.pieces(step):
            if owner == self._transport.comm.rank:
                self._transport.table.write(self._shards, spans, rows[start:stop])
        self._in_flight = None

    def finish(self) -> list[Tensor]:
        self._land()
        return self._shards


class Ring(SideBySide):
    """Layout `owner`, buckets that follow the owners: they walk a ring, one hop a step.

    Rank p starts with its own bucket and then computes with what rank p-1 had before, while
    its gradients' sums travel the same way (`TravellingSum`). With m buckets an owner there
    are m rounds of D steps.
    """

    def __init__(self, part: Part, comm: Comm, dtype: torch.dtype) -> None:
        self.part, self.comm, self.dtype = part, comm, dtype
        self.steps = len(part.buckets)
        assert self.steps % comm.size == 0
        self.rounds = self.steps // comm.size
        self.table = _OwnerTable(part, comm)

    def bucket(self, step: int) -> int:
        round_, hop = divmod(step, self.comm.size)
        return (self.comm.rank - hop) % self.comm.size * self.rounds + round_

    def post(self, step: int, weights: Sequence[Tensor], previous: Tensor | None) -> Pending:
        bucket = self.part.buckets[self.bucket(step)]
        rows = self.table.new_rows(weights, bucket, self.dtype)
        if step % self.comm.size == 0:  # the round starts with this rank's own
            self.table.read(weights, bucket, rows)
            return Pending(rows.t())
        assert previous is not None
        return self.comm.shift(previous.t(), rows, f"{self.part.label}/weights").then(Tensor.t)

    def gradients(self, weights: Sequence[Tensor]) -> Gradients:
        return _RingGradients(self, weights)


class _RingGradients:
    def __init__(self, transport: Ring, weights: Sequence[Tensor]) -> None:
        self._transport = transport
        self._shards = [torch.empty_like(w, dtype=torch.float32) for w in weights]
        self._sum: TravellingSum | None = None

    def _bucket(self, step: int) -> Bucket:
        return self._transport.part.buckets[self._transport.bucket(step)]

    def buffer(self, step: int) -> Columns:
        bucket = self._bucket(step)
        return Columns.of(self._transport.table.new_rows(self._shards, bucket, torch.float32).t(), bucket)

    def send(self, step: int, gradient: Columns) -> None:
        assert gradient.whole is not None
        ring, rows = self._transport, gradient.whole.t()
        round_, hop = divmod(step, ring.comm.size)
        if hop == 0:
            self._land(round_ - 1)
            self._sum = TravellingSum(ring.comm, f"{ring.part.label}/gradients")
        assert self._sum is not None
        last = hop == ring.comm.size - 1  # then this rank's own comes home
        arriving = self._bucket(round_ * ring.comm.size if last else step + 1)
        self._sum.add(hop, rows, (width(arriving), rows.shape[1]))

    def _land(self, round_: int) -> None:
        if self._sum is None:
            return
        own = self._bucket(round_ * self._transport.comm.size)
        self._transport.table.write(self._shards, own, self._sum.total())
        self._sum = None

    def finish(self) -> list[Tensor]:
        self._land(self._transport.rounds - 1)
        return self._shards
