"""Collectives over one group: posted, waited for once, and counted.

A group of one sends nothing and copies nothing. Every transfer is labelled, and the
elements and bytes it moves are added up in `Traffic`: what a gather brings INTO this
rank, what a reduction sends OUT of it. With D ranks both are (D-1)/D of the whole.
"""

import time
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed the two; 2.11 knows the old names alone.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class Posted:
    """The transfer that this rank posted last on an axis, the `number`-th there.

    bytes: of this rank's own buffer. since: `time.monotonic()` when it was posted.
    """

    operation: str
    label: str
    bytes: int
    number: int
    since: float
    works: tuple[weakref.ref[Any], ...]  # weak, so that no buffer outlives its transfer for this

    @property
    def has_finished(self) -> bool:
        """Whether it is over, or was waited for and forgotten."""
        works = [reference() for reference in self.works]
        return all(work is None or work.is_completed() for work in works)


class Traffic:
    """What this rank moved, and how long it stood waiting.

    elements, bytes: by label, as in `Comm`'s methods. last: by the axis, for who looks into a hang.
    """

    def __init__(self) -> None:
        self.elements: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.last: dict[str, Posted] = {}
        self._waited_s = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def count(self, label: str, elements: int, element_size: int) -> None:
        self.elements[label] += elements
        self.bytes[label] += elements * element_size

    def wait(self, works: Sequence[Any], on_gpu: bool) -> None:
        """Waits for `works`, adding the time to the exposed time.

        On a GPU it is the stream that waits, so two events measure it there.
        """
        if on_gpu:
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            for work in works:
                work.wait()
            after.record()
            self._events.append((before, after))
        else:
            start = time.perf_counter()
            for work in works:
                work.wait()
            self._waited_s += time.perf_counter() - start

    def take_exposed_ms(self) -> float:
        """Milliseconds of waiting since the last call; synchronises a GPU."""
        if self._events:
            torch.cuda.synchronize()
        exposed_ms = 1e3 * self._waited_s + sum(a.elapsed_time(b) for a, b in self._events)
        self._waited_s, self._events = 0.0, []
        return exposed_ms


class Pending:
    """A posted transfer: `wait()`, once, gives its result.

    Holds every buffer of the transfer until then.
    """

    def __init__(
        self,
        result: Tensor,
        works: Sequence[Any] = (),
        traffic: Traffic | None = None,
        keep: Sequence[Tensor] = (),
        finish: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._result: Tensor | None = result
        self._works, self._traffic, self._keep, self._finish = works, traffic, keep, finish

    def wait(self) -> Tensor:
        result = self._result
        if result is None:
            raise RuntimeError("this transfer was waited for already")
        if self._traffic is not None and self._works:
            self._traffic.wait(self._works, result.is_cuda)
        finish = self._finish
        self._result, self._works, self._keep, self._finish = None, (), (), None
        return finish(result) if finish else result

    def then(self, finish: Callable[[Tensor], Tensor]) -> "Pending":
        """The same transfer, with `finish` applied to what arrives."""
        assert self._finish is None
        self._finish = finish
        return self


class Comm:
    """The collectives of one process group, posted asynchronously."""

    def __init__(self, group: dist.ProcessGroup | None, traffic: Traffic | None = None) -> None:
        self.group = group
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        self.traffic = traffic or Traffic()
        self._axis = "" if group is None else group.group_desc
        self._posted = 0

    def _post(self, operation: str, label: str, buffer: Tensor, *works: Any) -> None:
        """Notes what was just posted."""
        self._posted += 1
        num_bytes, references = buffer.numel() * buffer.element_size(), tuple(map(weakref.ref, works))
        self.traffic.last[self._axis] = Posted(
            operation, label, num_bytes, self._posted, time.monotonic(), references
        )

    def _others(self, elements: int) -> int:
        return elements * (self.size - 1) // self.size

    def count(self, label: str, elements: int, element_size: int) -> None:
        """Counts what other ranks give, or are given, of so many elements: (D-1)/D."""
        self.traffic.count(label, self._others(elements), element_size)

    def all_gather(self, shard: Tensor, label: str) -> Pending:
        """Every rank's [n, ...] to every rank, as [D n, ...] in rank order."""
        if self.size == 1:
            return Pending(shard)
        shard = shard.contiguous()
        whole = shard.new_empty(self.size * shard.shape[0], *shard.shape[1:])
        self.count(label, whole.numel(), whole.element_size())
        work = _all_gather(whole, shard, group=self.group, async_op=True)
        self._post("all_gather", label, shard, work)
        return Pending(whole, [work], self.traffic, [shard])

    def reduce_scatter(self, whole: Tensor, label: str) -> Pending:
        """The sum over ranks of [D n, ...], of which rank r receives the r-th [n, ...]."""
        if self.size == 1:
            return Pending(whole)
        whole = whole.contiguous()
        shard = whole.new_empty(whole.shape[0] // self.size, *whole.shape[1:])
        self.count(label, whole.numel(), whole.element_size())
        work = _reduce_scatter(shard, whole, group=self.group, async_op=True)
        self._post("reduce_scatter", label, whole, work)
        return Pending(shard, [work], self.traffic, [whole])

    def all_reduce(self, tensor: Tensor, label: str) -> Pending:
        """The sum over ranks, in place, on every rank."""
        if self.size == 1:
            return Pending(tensor)
        self.traffic.count(label, 2 * self._others(tensor.numel()), tensor.element_size())
        work = dist.all_reduce(tensor, group=self.group, async_op=True)
        self._post("all_reduce", label, tensor, work)
        return Pending(tensor, [work], self.traffic)

    def all_to_all(self, parts: Tensor, label: str) -> Pending:
        """Part r of [D, ...] goes to rank r; what arrives is [D, ...] in sender order."""
        if self.size == 1:
            return Pending(parts)
        parts = parts.contiguous()
        arrived = torch.empty_like(parts)
        self.count(label, parts.numel(), parts.element_size())
        work = dist.all_to_all_single(arrived, parts, group=self.group, async_op=True)
        self._post("all_to_all", label, parts, work)
        return Pending(arrived, [work], self.traffic, [parts])

    def broadcast(self, buffer: Tensor, owner: int, label: str) -> Any:
        """Fills every rank's contiguous `buffer` with the owner's. Returns the work, for a Pending."""
        if self.rank != owner:
            self.traffic.count(label, buffer.numel(), buffer.element_size())
        work = dist.broadcast(buffer, group_src=owner, group=self.group, async_op=True)
        self._post("broadcast", label, buffer, work)
        return work

    def reduce(self, buffer: Tensor, owner: int, label: str) -> Any:
        """Sums every rank's contiguous `buffer` into the owner's. Returns the work, for a Pending."""
        if self.rank != owner:
            self.traffic.count(label, buffer.numel(), buffer.element_size())
        work = dist.reduce(buffer, group_dst=owner, group=self.group, async_op=True)
        self._post("reduce", label, buffer, work)
        return work

    def shift(self, outgoing: Tensor, incoming: Tensor, label: str) -> Pending:
        """One ring hop: `outgoing` to the next rank, `incoming` filled by the previous one.

        Called by all ranks in the same order; an empty tensor (on both its ends) does not travel.
        """
        after, before = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        self.traffic.count(label, incoming.numel(), incoming.element_size())
        transfers = []
        if outgoing.numel():
            transfers.append(dist.P2POp(dist.isend, outgoing, group=self.group, group_peer=after))
        if incoming.numel():
            transfers.append(dist.P2POp(dist.irecv, incoming, group=self.group, group_peer=before))
        works = dist.batch_isend_irecv(transfers) if transfers else []
        self._post("shift", label, outgoing, *works)
        return Pending(incoming, works, self.traffic, [outgoing])


class TravellingSum:
    """Sums every rank's contributions to every rank's tensor while they travel the ring.

    At step s rank p holds its contribution to the tensor of rank p - s. The sum for owner r
    starts at rank r + 1, gains one contribution a hop and reaches r after D - 1 hops, so the
    order of summation is fixed and each hop overlaps with the next step's computing.
    """

    def __init__(self, comm: Comm, label: str) -> None:
        self._comm, self._label = comm, label
        self._own: Tensor | None = None
        self._arriving: Pending | None = None

    def add(self, step: int, contribution: Tensor, next_shape: Sequence[int]) -> None:
        """Adds this step's contribution (contiguous; it is overwritten) and sends the sum on.

        next_shape: of the sum that arrives for the next step, or after the last step of this
        rank's own.
        """
        if step == 0:
            self._own = contribution
            return
        if self._arriving is not None:
            contribution += self._arriving.wait()
        self._arriving = self._comm.shift(contribution, contribution.new_empty(*next_shape), self._label)

    def total(self) -> Tensor:
        """This rank's own tensor, summed over all ranks; after the last step."""
        assert self._own is not None
        return self._own if self._arriving is None else self._own.add_(self._arriving.wait())
