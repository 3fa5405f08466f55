"""Whether memory between ranks works here: some rounds with known values, before anything depends on it."""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatsp_kernels.peers import local
from megatsp_kernels.streamed.exchange import Exchange

_ROUNDS = 3  # a slot is used again: what was read of it before would show
# Of a slice in fp32: on a GPU enough to show what caches do, else little for the interpreter.
_MOST_BYTES, _MOST_COLUMNS = {"cuda": 2**14, "cpu": 2**8}, 24


def probe(
    exchange: Exchange, dtype: torch.dtype, group: dist.ProcessGroup | None = None, timeout_s: float = 10
) -> str | None:
    """Publishes, pulls, multiplies, scatters and sums known values with all ranks of the group.

    timeout_s: of each wait. Returns None, or why it failed; the same on every rank. After a failure the
    exchange is of no use.
    """
    ranks, device = exchange.layout.ranks, exchange.memory.table.device
    # Alone first, with simulated peers: kernels are compiled then, which takes ranks unequally long.
    most = _MOST_BYTES[device.type]
    small = replace(exchange.layout, slice_bytes=most, gradient_bytes=most)
    alone = [Exchange(memory, small, timeout_s) for memory in local(small.num_bytes, ranks, device)]
    failure = _rounds(alone, 1, dtype)
    reason = _agree(failure and f"simulated peers: {failure}", ranks, group)
    if reason is None:
        before = exchange.timeout_s
        exchange.set_timeout(timeout_s)
        reason = _agree(_rounds([exchange], _ROUNDS, dtype), ranks, group)
        exchange.set_timeout(before)
    return reason


def _agree(reason: str, ranks: int, group: dist.ProcessGroup | None) -> str | None:
    reasons: list[str] = [""] * ranks
    dist.all_gather_object(reasons, reason, group)
    return next((f"rank {rank}: {text}" for rank, text in enumerate(reasons) if text), None)


def _rounds(exchanges: Sequence[Exchange], rounds: int, dtype: torch.dtype) -> str:
    """What is wrong with some rounds, or ""."""
    try:
        return next(filter(None, (_round(exchanges, i, dtype) for i in range(rounds))), "")
    except Exception as error:  # whatever it is: the others are waiting to hear of it
        return f"{type(error).__name__}: {error}".strip()


def _round(exchanges: Sequence[Exchange], index: int, dtype: torch.dtype) -> str:
    """One round of these ranks; what is wrong with their results, or ""."""
    layout, device = exchanges[0].layout, exchanges[0].memory.table.device
    room = min(layout.gradient_bytes // 4, layout.slice_bytes // dtype.itemsize)
    room = min(room, _MOST_BYTES[device.type] // 4)
    columns = max(1, min(_MOST_COLUMNS, room))
    rows, ranks = max(1, room // columns), layout.ranks

    def slice_of(peer: int) -> Tensor:
        """Small integers, other ones for each rank, round and place."""
        values = torch.arange(rows * columns, device=device).view(rows, columns)
        return (values + 3 * peer + 5 * index) % 7 - 3.0

    posted = [e.publish([slice_of(e.memory.rank)], dtype) for e in exchanges]
    ones = torch.ones(2, ranks * rows, device=device, dtype=dtype)
    sums = [e.matmul(ones, ones.t().contiguous()) for e in exchanges]
    gradients = [torch.empty(rows, columns, device=device) for _ in exchanges]
    collected = [e.collect([gradient]) for e, gradient in zip(exchanges, gradients, strict=True)]
    b = (torch.arange(columns, device=device) % 5).to(dtype)[None]
    for e, entry in zip(exchanges, collected, strict=True):
        entry.add(
            torch.full((ranks * rows, 1), e.memory.rank + index + 1.0, device=device, dtype=dtype), b, 0
        )
    for entry in collected:
        entry.wait()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    for e in exchanges:
        e.check()
    bucket = torch.cat([slice_of(peer) for peer in range(ranks)]).to(dtype)
    total = sum(peer + index + 1.0 for peer in range(ranks)) * b.float().expand(rows, -1)
    for name, all_found, wanted in (
        ("the bucket pulled", [entry.landing for entry in posted], bucket),
        ("a product", sums, torch.full_like(sums[0], float(ranks * rows))),
        ("a gradient", gradients, total),
    ):
        for found in all_found:
            if wrong := int((found != wanted).sum()):
                return f"{name} is wrong in {wrong} of {found.numel()} places, round {index}"
    return ""
