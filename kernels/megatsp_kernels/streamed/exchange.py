"""Which transfer is on its way: epochs, counters, and what each step must wait for."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatsp_kernels.common import INTERPRETER, target_of
from megatsp_kernels.peers import Layout, Memory, Status
from megatsp_kernels.streamed.op import (
    Peers,
    Pull,
    check_outs,
    matmul_pull,
    matmul_scatter,
    publish,
    pull,
    reduce,
    reduce_programs,
    scatter_tiles,
)

# Polls of a flag in a second: on a GPU each is two atomics in its memory, 0.7 us each; not measured there.
_POLLS_PER_S = {INTERPRETER: 3_000, "gpu": 700_000}


def layout_for(ranks: int, slice_bytes: int, gradient_bytes: int, device: torch.device) -> Layout:
    """The layout for slices up to these sizes (see `Layout`).

    A slice is published in enough pieces to fill a GPU's memory bus, each of some rows.
    """
    pieces = 2 if target_of(device) == INTERPRETER else 64
    return Layout(ranks, pieces, slice_bytes, gradient_bytes)


class Exchange:
    """All transfers of one rank in one group, one after another.

    Every rank calls the same methods in the same order. memory: of layout.num_bytes. timeout_s: after
    about so long a wait fails.
    """

    def __init__(self, memory: Memory, layout: Layout, timeout_s: float = 60) -> None:
        self.memory, self.layout = memory, layout
        self._device = memory.table.device
        self._status = Status(self._device)
        self.set_timeout(timeout_s)
        self._epoch = self._gradient_epoch = self._arrived = 0
        self._posted: Posted | None = None
        self._collected: list[Collected] = []

    def set_timeout(self, timeout_s: float) -> None:
        target = target_of(self._device)
        polls = _POLLS_PER_S.get(target, _POLLS_PER_S["gpu"]) * timeout_s
        self.timeout_s = timeout_s
        self.peers = Peers(self.memory, self.layout, self._status, int(min(polls, 2**31 - 1)))

    def publish(self, columns: Sequence[Tensor], dtype: torch.dtype) -> "Posted":
        """Posts the bucket of which these [h/D, n_i] are this rank's slice. See `op.publish`.

        One bucket is on its way at a time: an older one is pulled first.

        Raises:
            PeerError: an earlier wait has failed.
        """
        self.check()
        if self._posted is not None:
            self._posted.wait()
        self._epoch += 1
        publish(self.peers, self._epoch, columns, dtype)
        rows, width = columns[0].shape[0] * self.layout.ranks, sum(c.shape[1] for c in columns)
        self._posted = Posted(
            self, Pull(self.peers, self._epoch, columns[0].new_empty(rows, width, dtype=dtype))
        )
        return self._posted

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        """a [n, h] times b [h, m]; whatever is on its way arrives meanwhile. See `op.matmul_pull`."""
        job = self._take()
        return a @ b if job is None else matmul_pull(a, b, job)

    def collect(self, outs: Sequence[Tensor]) -> "Collected":
        """Begins the gradient whose sum over ranks is to fill these fp32 [h/D, n_i]. See `op.reduce`.

        Raises:
            PeerError: an earlier wait has failed.
            ValueError: outs that `op.reduce` does not take.
        """
        self.check()
        check_outs("collect", outs)
        while len(self._collected) > 1:  # there is room for two
            self._collected[0].wait()
        self._gradient_epoch += 1
        self._collected.append(Collected(self, self._gradient_epoch, outs))
        return self._collected[-1]

    def check(self) -> None:
        """Raises PeerError if a wait of this rank has failed; waits for no kernel."""
        self._status.check(self.memory.rank, self.timeout_s)

    def close(self) -> None:
        """Lets go of the memory, which no rank may use any more."""
        self._posted = None
        self._collected.clear()
        self.memory.close()

    def _take(self) -> Pull | None:
        posted, self._posted = self._posted, None
        return None if posted is None else posted.job


class Posted:
    """A bucket on its way; `wait`, or the exchange's next `matmul`, brings it. landing: [h, R]."""

    def __init__(self, exchange: Exchange, job: Pull) -> None:
        self._exchange, self.job = exchange, job
        self.landing = job.landing

    def wait(self) -> None:
        """Pulls it now, if no product has."""
        if self._exchange._posted is self:
            pull(self._exchange._take() or self.job)


class Collected:
    """A gradient [h, R] whose rows go to their owners as they are computed."""

    def __init__(self, exchange: Exchange, epoch: int, outs: Sequence[Tensor]) -> None:
        self._exchange, self._epoch, self._outs = exchange, epoch, outs
        self.width = sum(out.shape[1] for out in outs)
        self._target = exchange._arrived

    def add(self, a: Tensor, b: Tensor, first: int) -> None:
        """Columns from `first` on are a [h, n] times b [n, m]. See `op.matmul_scatter`."""
        exchange = self._exchange
        assert exchange._collected[-1] is self, "a later gradient has begun"
        # What was in this place is summed two gradients ago.
        freed = (self._epoch - 2) * reduce_programs(a.device)
        matmul_scatter(a, b, exchange.peers, self._epoch, freed, first, self.width)
        exchange._arrived += scatter_tiles(exchange.peers, a, b)
        self._target = exchange._arrived

    def wait(self) -> None:
        """Sums the gradient, and those begun before it, into its outs, unless that is done."""
        collected = self._exchange._collected
        while self in collected:
            oldest = collected.pop(0)
            reduce(self._exchange.peers, oldest._epoch, oldest._target, oldest._outs)
