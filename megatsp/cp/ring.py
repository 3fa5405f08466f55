"""S-1 hops of keys and values to the next rank; gradients travel along behind.

A rank receives S-1 shards of 2 B K d T/S elements, and holds two at once.
Source: Liu et al., Ring Attention, arXiv:2310.01889.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from megatsp.comm import Comm, TravellingSum
from megatsp.cp.blockwise import Visit


def visit(from_earlier: bool, queries: int, keys: int) -> Visit:
    """Which of our `queries` tokens see which of the `keys` tokens of another rank, or group of ranks.

    Both are two spans of the sequence, in order. An earlier rank's lie on either side of ours, so all
    queries see its low half; a later rank's lie between ours, so our high half sees both.
    """
    if from_earlier:
        return slice(None), slice(0, keys // 2)
    return slice(queries // 2, None), slice(None)


class RingExchange:
    """An `Exchange` over the S ranks of `comm`."""

    def __init__(self, comm: Comm, kv: Tensor, label: str) -> None:
        self._comm, self._label, self._step = comm, label, 0
        self._kv = comm.shift(kv, torch.empty_like(kv), label)
        self._sum = TravellingSum(comm, "kv/gradients")

    def arrivals(self) -> Iterator[tuple[Tensor, list[Visit]]]:
        rank, size = self._comm.rank, self._comm.size
        for self._step in range(1, size):
            kv = self._kv.wait()
            if self._step < size - 1:
                self._kv = self._comm.shift(kv, torch.empty_like(kv), self._label)
            tokens = kv.shape[-2]
            yield kv, [visit((rank - self._step) % size < rank, tokens, tokens)]
            del kv

    def send(self, gradient: Tensor) -> None:
        self._sum.add(self._step, gradient, gradient.shape)

    def total(self, own: Tensor) -> Tensor:
        self._sum.add(0, own, own.shape)
        return self._sum.total()
