"""Weights that arrive inside a product's kernel, and gradients that leave inside one: no collectives.

Layout `hidden` among ranks of one host, which read and write each other's memory. A bucket's first product
carries the pull of the next one; the products of its gradient write each tile to its owner.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from megatsp.comm import Comm, Pending
from megatsp.tsp.buckets import Columns, Part, h_major, width
from megatsp.tsp.transport import Gradients, SideBySide

if TYPE_CHECKING:
    from megatsp_kernels.peers import Memory
    from megatsp_kernels.streamed import Collected, Exchange


class Streamed(SideBySide):
    """Layout `hidden`, through an `Exchange` that all parts and layers share.

    At most one bucket is on its way: it arrives with the next product of any bucket, or when waited for.
    """

    def __init__(self, part: Part, comm: Comm, dtype: torch.dtype, exchange: "Exchange") -> None:
        self.part, self.comm, self.dtype, self.exchange = part, comm, dtype, exchange
        self.steps = len(part.buckets)

    def post(self, step: int, weights: Sequence[Tensor], previous: Tensor | None) -> Pending:
        del previous
        posted = self.exchange.publish(self.part.views(step, weights), self.dtype)
        bucket = posted.landing
        self.comm.count(f"{self.part.label}/weights", bucket.numel(), bucket.element_size())
        return Pending(bucket, [posted], self.comm.traffic)

    def columns(self, step: int, weights: Sequence[Tensor], arrived: Tensor) -> Columns:
        del weights
        pieces = arrived.split([s.width for s in self.part.buckets[step]], 1)
        return _Arrived(pieces, arrived, self.exchange)

    def gradients(self, weights: Sequence[Tensor]) -> Gradients:
        return _StreamedGradients(self, weights)


class _Arrived(Columns):
    """A bucket whose products bring what is on its way."""

    def __init__(self, pieces: Sequence[Tensor], whole: Tensor, exchange: "Exchange") -> None:
        super().__init__(pieces, whole)
        self._exchange = exchange

    def times(self, rows: Tensor, start: int, stop: int) -> Tensor:
        (columns,) = self._between(start, stop)
        return self._exchange.matmul(_with_unit_stride(rows), columns)


class _Leaving(Columns):
    """A gradient that is nowhere: its products go to the owners of their rows."""

    def __init__(self, widths: Sequence[int], collected: "Collected") -> None:
        super().__init__([])
        self._widths, self.collected = widths, collected

    def set(self, start: int, stop: int, a: Tensor, b: Tensor) -> None:
        self.collected.add(_with_unit_stride(a), _with_unit_stride(b), sum(self._widths[:start]))


class _StreamedGradients:
    def __init__(self, transport: Streamed, weights: Sequence[Tensor]) -> None:
        self._transport = transport
        self._shards = [torch.empty_like(w, dtype=torch.float32) for w in weights]
        self._in_flight: Collected | None = None

    def buffer(self, step: int) -> Columns:
        transport = self._transport
        collected = transport.exchange.collect(transport.part.views(step, self._shards))
        return _Leaving([s.width for s in transport.part.buckets[step]], collected)

    def send(self, step: int, gradient: Columns) -> None:
        """It was sent as it was computed; sums the one before."""
        assert isinstance(gradient, _Leaving)
        self._land()
        self._in_flight = gradient.collected
        rows = h_major(self._shards[0], self._transport.part.matrices[0]).shape[0]
        comm, part = self._transport.comm, self._transport.part
        comm.count(f"{part.label}/gradients", rows * comm.size * width(part.buckets[step]), 4)

    def _land(self) -> None:
        if self._in_flight is not None:
            self._in_flight.wait()
        self._in_flight = None

    def finish(self) -> list[Tensor]:
        self._land()
        return self._shards


def _with_unit_stride(matrix: Tensor) -> Tensor:
    return matrix if 1 in matrix.stride() else matrix.contiguous()


@dataclass(frozen=True)
class Overlap:
    """How the weights of tsp travel: through an exchange, or by collectives if there is none; and why."""

    exchange: "Exchange | None"
    reason: str

    def __str__(self) -> str:
        return f"{'collective' if self.exchange is None else 'fused'}: {self.reason}"


def choose_overlap(
    wanted: str,
    layout: str,
    parts: Sequence[Part],
    h: int,
    comm: Comm,
    device: torch.device,
    dtype: torch.dtype,
    timeout_s: float,
) -> Overlap:
    """parallel.overlap, resolved; the same on every rank of the tsp group, which all call it.

    parts: those that travel through the exchange. timeout_s: after so long a wait for a rank fails.

    Raises:
        ValueError: fused is wanted, and impossible here: why.
    """
    if comm.size == 1:
        return Overlap(None, "one tsp rank: nothing travels")
    if wanted == "collective":
        return Overlap(None, "parallel.overlap=collective")
    if wanted == "auto" and device.type != "cuda":
        return Overlap(None, "the ranks compute on CPUs")
    reason = _agreed(_obstacle(layout, device, dtype), comm)
    if not reason:
        largest = h // comm.size * max(width(bucket) for part in parts for bucket in part.buckets)
        overlap = _open(largest, comm, device, dtype, timeout_s)
        if overlap.exchange is not None:
            return overlap
        reason = overlap.reason
    if wanted == "fused":
        raise ValueError(f"parallel.overlap=fused: {reason}; use parallel.overlap=auto or collective")
    return Overlap(None, reason)


def _obstacle(layout: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why this rank cannot, or ""."""
    if layout != "hidden":
        return f"parallel.tsp_layout={layout} sends buckets by broadcasts and round a ring"
    try:
        from megatsp_kernels.common import target_of

        target_of(device)
    except (ImportError, ValueError) as error:
        return str(error)
    if device.type == "cpu" and dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bf16 wrongly: trainer.dtype=fp32"
    return ""


def _agreed(reason: str, comm: Comm) -> str:
    """The first rank's reason, of those that have one."""
    reasons: list[str] = [""] * comm.size
    dist.all_gather_object(reasons, reason, comm.group)
    return next((f"tsp rank {rank}: {text}" for rank, text in enumerate(reasons) if text), "")


def _open(largest: int, comm: Comm, device: torch.device, dtype: torch.dtype, timeout_s: float) -> Overlap:
    """The first kind of memory that works here; largest: elements of a slice."""
    from megatsp_kernels.peers import on_one_host
    from megatsp_kernels.streamed import Exchange, layout_for, probe

    if not on_one_host(comm.group):
        return Overlap(None, "the ranks of the tsp group are on several hosts or containers")
    layout = layout_for(comm.size, largest * dtype.itemsize, largest * 4, device)
    failures = []
    for name, make in _providers(layout.num_bytes, device, comm):
        try:
            memory = make()
        except ValueError as error:
            failures.append(str(error))
            continue
        exchange = Exchange(memory, layout, timeout_s)
        failure = probe(exchange, dtype, comm.group)
        if failure is None:
            return Overlap(exchange, f"{name}, {layout.num_bytes / 2**20:.1f} MiB a rank")
        failures.append(f"{name}: {failure}")
        exchange.close()
    return Overlap(None, "; ".join(failures))


def _providers(
    num_bytes: int, device: torch.device, comm: Comm
) -> Iterator[tuple[str, Callable[[], "Memory"]]]:
    from megatsp_kernels import peers

    group = comm.group
    assert group is not None
    if device.type == "cuda":
        yield "symmetric memory", lambda: peers.symmetric(num_bytes, device, group)
        yield "memory between processes", lambda: peers.ipc(num_bytes, device, group)
    else:
        yield "shared memory", lambda: peers.shared(num_bytes, group)
