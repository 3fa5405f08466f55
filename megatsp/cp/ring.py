"""S-1 hops of keys and values to the next rank; gradients travel along behind.

A rank receives S-1 shards of 2 B K d T/S elements, and holds two at once.
Source: Liu et al., Ring Attention, arXiv:2310.01889.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from megatsp.comm import Comm, TravellingSum
from megatsp.cp.exchange import Arrival


class RingExchange:
    """An `Exchange` over the S ranks of `comm`."""

    def __init__(self, comm: Comm, kv: Tensor, label: str) -> None:
        self._comm, self._label, self._step = comm, label, 0
        self.count = comm.size - 1
        self._kv = comm.shift(kv, torch.empty_like(kv), label)
        self._sum = TravellingSum(comm, "kv/gradients")

    def arrivals(self) -> Iterator[Arrival]:
        rank, size = self._comm.rank, self._comm.size
        for self._step in range(1, size):
            kv = self._kv.wait()
            if self._step < size - 1:
                self._kv = self._comm.shift(kv, torch.empty_like(kv), self._label)
            arrival = Arrival(kv[None], (rank - self._step) % size)
            del kv
            yield arrival
            del arrival

    def send(self, gradient: Tensor) -> None:
        self._sum.add(self._step, gradient[0], gradient[0].shape)

    def total(self, own: Tensor) -> Tensor:
        self._sum.add(0, own, own.shape)
        return self._sum.total()
