"""The small parameters under tensor parallelism: norm and head gains whole on every rank, biases cut."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatsp.comm import Comm
from megatsp.tsp.attention import HeadVectors
from megatsp.tsp.small import Arriving


class ReplicatedGains:
    """As tsp/small.py's SmallParameters: nothing arrives, and what is whole is summed on the way home."""

    def __init__(self, comm: Comm) -> None:
        self._comm = comm

    def prefetch(self, gains: Sequence[Tensor]) -> None:
        """Nothing to post: they are here."""

    def gains(self, gains: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(gains))

    def reduce(self, dgains: Sequence[Tensor], dvectors: HeadVectors) -> Arriving:
        """Sums over the group, fp32. A rank's norms saw its own tokens, its head gains its own heads.

        The gradients of its biases are whole already: it has their heads for all tokens.
        """
        partial = [*dgains, *(dvectors.gains or ())]
        pending = self._comm.all_reduce(torch.cat([t.flatten() for t in partial]), "small")

        def arrived() -> tuple[list[Tensor], list[Tensor]]:
            pieces = pending.wait().split([t.numel() for t in partial])
            sums = [piece.view_as(t).clone() for piece, t in zip(pieces, partial, strict=True)]
            return sums[: len(dgains)], [*(dvectors.biases or ()), *sums[len(dgains) :]]

        return arrived
