"""One all-gather of keys and values; gradients return by one reduce-scatter.

A rank receives S-1 shards of 2 B K d T/S elements, and holds all S at once.
Source: The Llama 3 Herd of Models, arXiv:2407.21783, section 3.3.2.
"""

from collections.abc import Iterator

from torch import Tensor

from megatsp.comm import Comm, Pending
from megatsp.cp.blockwise import Visit
from megatsp.tsp.partition import to_global, to_shards


class AllGatherExchange:
    """An `Exchange` over the S ranks of `comm`."""

    def __init__(self, comm: Comm, kv: Tensor, label: str) -> None:
        self._comm, self._chunk = comm, kv.shape[-2] // 2
        self._kv = comm.all_gather(kv[None], label)
        self._gradient: Pending | None = None

    def arrivals(self) -> Iterator[tuple[Tensor, list[Visit]]]:
        yield self.take()

    def take(self) -> tuple[Tensor, list[Visit]]:
        """The only arrival."""
        # In sequence order rank p's queries see chunks 0..p-1, and the later half of them,
        # chunk 2S-1-p, also chunks p+1..2S-2-p; chunk p and itself were its own block.
        rank, size, chunk = self._comm.rank, self._comm.size, self._chunk
        earlier = (slice(None), slice(0, rank * chunk))
        between = (slice(chunk, None), slice((rank + 1) * chunk, (2 * size - 1 - rank) * chunk))
        visits = [visit for visit in (earlier, between) if visit[1].start < visit[1].stop]
        # The copy into sequence order costs less than a visit to every chunk where it lies.
        return to_global(self._kv.wait()), visits

    def send(self, gradient: Tensor) -> None:
        self._gradient = self._comm.reduce_scatter(to_shards(gradient, self._comm.size), "kv/gradients")

    def total(self, own: Tensor) -> Tensor:
        assert self._gradient is not None
        return own.add_(self._gradient.wait()[0])
