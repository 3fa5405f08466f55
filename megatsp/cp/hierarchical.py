"""A ring over the slow axis, an all-gather over the fast one at every step.

The S = C D ranks are C groups of D: `outer` joins the ranks at the same place in every group,
`inner` those of one group, and rank t of group c is rank c D + t of the sequence. The chunks of
group c, in order, are the superchunks c and 2C-1-c of 2C: the groups are a zigzag ring, and the
ranks within a group are a zigzag partition of what it holds.

A rank receives S-1 shards of 2 B K d T/S elements as in the other exchanges, but only C-1 of
them by the slow axis: every token crosses it once a hop, and a group's ranks share what crossed.
It holds two gathered groups at once: one attended to, one on its way.

Source: Gu et al., LoongTrain, arXiv:2406.18485, section 4 (rings over two axes).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from megatsp.comm import Comm, Pending, TravellingSum
from megatsp.cp.allgather import AllGatherExchange
from megatsp.cp.exchange import Arrival


class HierarchicalExchange:
    """An `Exchange` over `outer` times `inner`, of two ranks or more each."""

    def __init__(self, outer: Comm, inner: Comm, kv: Tensor, label: str) -> None:
        self._outer, self._inner, self._label = outer, inner, label
        self._step, self.count = 0, outer.size
        self._hop = outer.shift(kv, torch.empty_like(kv), label)
        self._own_group = AllGatherExchange(inner, kv, label, outer.rank * inner.size)
        self._gathering: Pending | None = None
        self._reducing: Pending | None = None
        self._sum = TravellingSum(outer, "kv/gradients")

    def arrivals(self) -> Iterator[Arrival]:
        groups = self._outer.size
        yield self._take_own_group()
        for self._step in range(1, groups):
            yield self._take()

    def _take_own_group(self) -> Arrival:
        arrival = self._own_group.take()
        self._gather_next()
        return arrival

    def _take(self) -> Arrival:
        """The gathered group of this step; the next one's transfers are posted."""
        assert self._gathering is not None
        group = (self._outer.rank - self._step) % self._outer.size
        arrival = Arrival(self._gathering.wait(), group * self._inner.size)
        if self._step < self._outer.size - 1:
            self._gather_next()
        return arrival

    def _gather_next(self) -> None:
        # The shard of the next step's group came by the ring; it goes on, and to the whole of ours.
        shard = self._hop.wait()
        if self._step + 2 < self._outer.size:
            self._hop = self._outer.shift(shard, torch.empty_like(shard), self._label)
        self._gathering = self._inner.all_gather(shard[None], self._label)

    def send(self, gradient: Tensor) -> None:
        if self._step == 0:
            self._own_group.send(gradient)
            return
        self._pass_on(self._step - 1)
        self._reducing = self._inner.reduce_scatter(gradient, "kv/gradients")

    def _pass_on(self, step: int) -> None:
        """Adds our group's gradient of that step, for the ranks at our place, to the sum that travels.

        One step late, so that its reduce-scatter overlaps with a step's computing.
        """
        if self._reducing is not None:
            gradient = self._reducing.wait()[0]
            self._sum.add(step, gradient, gradient.shape)

    def total(self, own: Tensor) -> Tensor:
        self._pass_on(self._step)
        own = self._own_group.total(own)
        self._sum.add(0, own, own.shape)
        return self._sum.total()
