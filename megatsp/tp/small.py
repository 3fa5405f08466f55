"""The small parameters under tensor parallelism: rows of width h and head gains whole, the others cut.

Cut with their matrix are biases and the sides of adapters without h.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatsp.comm import Comm
from megatsp.tsp.attention import HeadVectors
from megatsp.tsp.small import Arriving, stacked


class ReplicatedGains:
    """As tsp/small.py's SmallParameters: nothing arrives, and what is whole is summed on the way home."""

    def __init__(self, comm: Comm) -> None:
        self._comm = comm

    def prefetch(self, gains: Sequence[Tensor]) -> None:
        """Nothing to post: they are here."""

    def gains(self, gains: Sequence[Tensor]) -> Tensor:
        return stacked(gains)

    def reduce(
        self, drows: Sequence[Tensor], dvectors: HeadVectors, dinner: Sequence[Tensor] = ()
    ) -> Arriving:
        """Sums over the group, fp32. A rank's norms saw its own tokens, its head gains its own heads.

        Adapters' rows saw all tokens, but through this rank's columns. The gradients of biases and of
        adapters' other sides are whole already: the rank has their columns for all tokens.
        """
        partial = [*drows, *(dvectors.gains or ())]
        pending = self._comm.all_reduce(torch.cat([t.flatten() for t in partial]), "small")

        def arrived() -> tuple[list[Tensor], list[Tensor]]:
            pieces = pending.wait().split([t.numel() for t in partial])
            sums = [piece.view_as(t).clone() for piece, t in zip(pieces, partial, strict=True)]
            return sums[: len(drows)], [*(dvectors.biases or ()), *sums[len(drows) :], *dinner]

        return arrived
