"""One all-gather of keys and values; gradients return by one reduce-scatter.

A rank receives S-1 shards of 2 B K d T/S elements, and holds all S at once.
Source: The Llama 3 Herd of Models, arXiv:2407.21783, section 3.3.2.
"""

from collections.abc import Iterator

from torch import Tensor

from megatsp.comm import Comm, Pending
from megatsp.cp.exchange import Arrival


class AllGatherExchange:
    """An `Exchange` over the S ranks of `comm`; `first`: of them in the sequence."""

    count = 1

    def __init__(self, comm: Comm, kv: Tensor, label: str, first: int = 0) -> None:
        self._comm, self._first = comm, first
        self._kv = comm.all_gather(kv[None], label)
        self._gradient: Pending | None = None

    def arrivals(self) -> Iterator[Arrival]:
        yield self.take()

    def take(self) -> Arrival:
        """The only arrival."""
        return Arrival(self._kv.wait(), self._first)

    def send(self, gradient: Tensor) -> None:
        self._gradient = self._comm.reduce_scatter(gradient, "kv/gradients")

    def total(self, own: Tensor) -> Tensor:
        assert self._gradient is not None
        return own.add_(self._gradient.wait()[0])
