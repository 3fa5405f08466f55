"""The small parameters of a layer: rows of width h, sharded over h, and others whole on every rank.

Rows are norm gains and the sides of adapters that have h (see lora.py); the others are biases, head gains
and the adapters' other sides. They are too small to stream. Rows arrive by one all-gather; the gradients of
all that are trained go home by one all-reduce, of which a row's owner takes its slice.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from megatsp.comm import Comm, Pending
from megatsp.tsp.attention import HeadVectors

Arriving = Callable[[], tuple[list[Tensor], list[Tensor]]]  # waits, once


class Small(Protocol):
    """`prefetch()` posts the rows, `gains()` takes them; `reduce()` posts the gradients' way home."""

    def prefetch(self, shards: Sequence[Tensor]) -> None: ...

    def gains(self, shards: Sequence[Tensor]) -> Tensor:
        """The whole rows, one below the other: [n, h]."""

    def reduce(
        self, drows: Sequence[Tensor], dvectors: HeadVectors, dinner: Sequence[Tensor] = ()
    ) -> Arriving:
        """From this rank's share of the gradients to those of its parameters, fp32: rows, then the others.

        drows: [h] or [n, h] each. dinner: of adapters' sides without h.
        """


class SmallParameters:
    """`Small` on the tsp axis: rows are cut over h, the others are whole."""

    def __init__(self, comm: Comm) -> None:
        self._comm = comm
        self._ahead: Pending | None = None

    def prefetch(self, shards: Sequence[Tensor]) -> None:
        """Posts the all-gather of rows given as [h/D] or [n, h/D] shards; in the first one's dtype."""
        if self._ahead is not None:
            raise RuntimeError("the gains are on their way already")
        rows = stacked(shards)
        # [D, n, h/D] in rank order is [n, h] with the rank inside.
        self._ahead = self._comm.all_gather(rows[None], "small").then(
            lambda whole: whole.transpose(0, 1).reshape(len(rows), -1)
        )

    def gains(self, shards: Sequence[Tensor]) -> Tensor:
        """The whole rows, one below the other: [n, h]."""
        if self._ahead is None:
            self.prefetch(shards)
        pending, self._ahead = self._ahead, None
        assert pending is not None
        return pending.wait()

    def reduce(
        self, drows: Sequence[Tensor], dvectors: HeadVectors, dinner: Sequence[Tensor] = ()
    ) -> Arriving:
        """Sums local gradients over the group: rows' as their shards over h, the others' whole; fp32."""
        local = [*drows, *dvectors.tensors(), *dinner]
        pending = self._comm.all_reduce(torch.cat([t.flatten() for t in local]), "small")

        def arrived() -> tuple[list[Tensor], list[Tensor]]:
            pieces = pending.wait().split([t.numel() for t in local])
            sums = [piece.view_as(t) for piece, t in zip(pieces, local, strict=True)]
            shards = [s.chunk(self._comm.size, -1)[self._comm.rank].clone() for s in sums[: len(drows)]]
            return shards, [s.clone() for s in sums[len(drows) :]]

        return arrived


def stacked(rows: Sequence[Tensor]) -> Tensor:
    """[n], and [k, n] each, one below the other, in the first one's dtype."""
    return torch.cat([row.reshape(-1, row.shape[-1]).to(rows[0].dtype) for row in rows])
