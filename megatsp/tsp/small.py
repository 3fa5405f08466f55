"""The small parameters of a layer: norm gains [h], sharded over h, and vectors whole on every rank.

They are too small to stream. Gains arrive by one all-gather; the gradients of all of them go
home by one all-reduce, of which a gain's owner takes its slice.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from megatsp.comm import Comm, Pending
from megatsp.tsp.attention import HeadVectors

Arriving = Callable[[], tuple[list[Tensor], list[Tensor]]]  # waits, once


class Small(Protocol):
    """`prefetch()` posts the gains, `gains()` takes them; `reduce()` posts the gradients' way home."""

    def prefetch(self, shards: Sequence[Tensor]) -> None: ...

    def gains(self, shards: Sequence[Tensor]) -> Tensor:
        """The whole gains: [n, h]."""

    def reduce(self, dgains: Sequence[Tensor], dvectors: HeadVectors) -> Arriving:
        """From this rank's share of the gradients to those of its parameters: gains and vectors, fp32."""


class SmallParameters:
    """`Small` on the tsp axis: gains are cut over h, vectors are whole."""

    def __init__(self, comm: Comm) -> None:
        self._comm = comm
        self._ahead: Pending | None = None

    def prefetch(self, shards: Sequence[Tensor]) -> None:
        """Posts the all-gather of gains given as [h/D] shards."""
        if self._ahead is not None:
            raise RuntimeError("the gains are on their way already")
        count = len(shards)
        stacked = torch.stack(list(shards))[None]
        # [D, n, h/D] in rank order is [n, h] with the rank inside.
        self._ahead = self._comm.all_gather(stacked, "small").then(
            lambda whole: whole.transpose(0, 1).reshape(count, -1)
        )

    def gains(self, shards: Sequence[Tensor]) -> Tensor:
        """The whole gains: [n, h]."""
        if self._ahead is None:
            self.prefetch(shards)
        pending, self._ahead = self._ahead, None
        assert pending is not None
        return pending.wait()

    def reduce(self, dgains: Sequence[Tensor], dvectors: HeadVectors) -> Arriving:
        """Sums local gradients over the group: gains' as their [h/D] shards, vectors' whole; fp32."""
        local = [*dgains, *dvectors.tensors()]
        pending = self._comm.all_reduce(torch.cat([t.flatten() for t in local]), "small")

        def arrived() -> tuple[list[Tensor], list[Tensor]]:
            pieces = pending.wait().split([t.numel() for t in local])
            sums = [piece.view_as(t) for piece, t in zip(pieces, local, strict=True)]
            shards = [s.chunk(self._comm.size)[self._comm.rank].clone() for s in sums[: len(dgains)]]
            return shards, [s.clone() for s in sums[len(dgains) :]]

        return arrived
