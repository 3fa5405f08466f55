"""The small parameters under tensor parallelism: norm and head gains whole on every rank, biases cut."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatsp.comm import Comm
from megatsp.tsp.attention import HeadVectors


class ReplicatedGains:
    """As tsp/small.py's SmallParameters: nothing arrives, and what is whole is summed on the way home."""

    def __init__(self, comm: Comm) -> None:
        self._comm = comm

    def prefetch(self, gains: Sequence[Tensor]) -> None:
        """Nothing to post: they are here."""

    def gains(self, gains: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(gains))

    def reduce(self, dgains: Sequence[Tensor], dvectors: HeadVectors) -> tuple[list[Tensor], list[Tensor]]:
        """Sums over the group, fp32. A rank's norms saw its own tokens, its head gains its own heads.

        The gradients of its biases are whole already: it has their heads for all tokens.
        """
        head_gains = dvectors.gains or ()
        partial = [*dgains, *head_gains]
        total = self._comm.all_reduce(torch.cat([t.flatten() for t in partial]), "small").wait()
        sums = [
            s.view_as(t).clone()
            for s, t in zip(total.split([t.numel() for t in partial]), partial, strict=True)
        ]
        return sums[: len(dgains)], [*(dvectors.biases or ()), *sums[len(dgains) :]]
