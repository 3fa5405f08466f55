"""What a rank of the preflight measures: products on its device, transfers in its groups, hops between nodes.

All ranks call these together, in the same order. Whatever travels is a known pattern, of whole numbers that
every dtype holds exactly, sums included; what arrives is held against it.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatsp.comm import Comm
from megatsp.model.parallelize import DTYPES
from megatsp.preflight.transfers import Transfer, bus_bytes
from megatsp.schema import Config

Clock = Callable[[], float]

_FLOPS = {"cuda": 2**42, "cpu": 2**29}  # of one product at most
_SHARE_S = 0.2  # of a device's time for one timing
_MOVED, _ADDED = 64, 4  # values of a pattern; bf16 has all sums up to 256, of more ranks than tp has


@dataclass(frozen=True)
class Bench:
    """How to time. repeats: timings, of which the median counts. clock: in seconds."""

    device: torch.device
    repeats: int
    clock: Clock = time.perf_counter

    def time(self, prepare: Callable[[], Tensor], work: Callable[[Tensor], Tensor]) -> tuple[float, Tensor]:
        """(median seconds of `work` on what `prepare` gave, its last result); once more first, to warm up."""
        seconds = []
        for _ in range(self.repeats + 1):
            given = prepare()
            self._synchronize()
            start = self.clock()
            result = work(given)
            self._synchronize()
            seconds.append(self.clock() - start)
        return max(statistics.median(seconds[1:]), 1e-9), result

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def product_shape(config: Config, device: torch.device) -> tuple[int, int, int]:
    """(rows, h, F) of the product that is measured: the MLP's, of a micro-batch's tokens on this rank."""
    t, p, m = config.trainer, config.parallel, config.model
    tokens = t.micro_batch_size * t.seq_length // (p.cp * p.tsp)
    most = _FLOPS[device.type] // (2 * m.hidden_size * m.ffn_hidden_size)
    return max(1, min(tokens, most)), m.hidden_size, m.ffn_hidden_size


def measure_product(config: Config, bench: Bench) -> tuple[float, bool]:
    """(TFLOP/s of this device in the model's dtype, whether a product of whole numbers is right)."""
    rows, h, ffn = product_shape(config, bench.device)
    dtype, device = DTYPES[config.trainer.dtype], bench.device
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(n, h, generator=generator, device=device).to(dtype) for n in (rows, ffn))

    def times_b(left: Tensor) -> Tensor:
        for _ in range(count):
            result = left @ b.t()
        return result

    count = 1
    once, _ = bench.time(lambda: a, times_b)
    count = max(1, min(200, int(_SHARE_S / bench.repeats / once)))
    seconds, _ = bench.time(lambda: a, times_b)
    # Few enough ones that all sums are exact in bf16, in whatever order they are added.
    left, right = (_few_ones(n, h, one_in, generator).to(dtype) for n, one_in in ((rows, 4), (ffn, 16)))
    wanted = left.double() @ right.sum(0, dtype=torch.float64)
    is_right = torch.equal((left @ right.t()).sum(1, dtype=torch.float64), wanted)
    return 2e-12 * rows * h * ffn * count / seconds, is_right


def _few_ones(rows: int, columns: int, one_in: int, generator: torch.Generator) -> Tensor:
    """Zeros, but of so many one is 1 or -1."""
    drawn = torch.randint(2 * one_in, (rows, columns), generator=generator, device=generator.device)
    return (drawn == 0).int() - (drawn == 1).int()


def measure_transfer(transfer: Transfer, comm: Comm, bench: Bench) -> tuple[float, bool]:
    """(bus bandwidth in GB/s as this rank sees it, whether what arrived is right); on all ranks of `comm`."""
    per_rank = -(-transfer.elements // comm.size)
    dtype = DTYPES[transfer.dtype]
    sums = transfer.operation in ("reduce_scatter", "all_reduce", "reduce")
    in_parts = transfer.operation == "all_gather"
    own = _pattern(per_rank if in_parts else per_rank * comm.size, comm.rank, sums, bench.device)

    def prepare() -> Tensor:
        given = own.to(dtype, copy=True)
        dist.barrier(comm.group)
        return given

    seconds, result = bench.time(prepare, lambda given: _run(transfer.operation, given, comm))
    right = _is_right(transfer.operation, result, own, per_rank, comm)
    num_bytes = per_rank * comm.size * dtype.itemsize
    return 1e-9 * bus_bytes(transfer.operation, num_bytes, comm.size) / seconds, right


def _run(operation: str, given: Tensor, comm: Comm) -> Tensor:
    label = "preflight"
    if operation == "shift":
        return comm.shift(given, torch.empty_like(given), label).wait()
    if operation == "all_to_all":
        return comm.all_to_all(given.view(comm.size, -1), label).wait().flatten()
    if operation in ("broadcast", "reduce"):
        work = comm.broadcast(given, 0, label) if operation == "broadcast" else comm.reduce(given, 0, label)
        work.wait()
        return given
    pending = {
        "all_gather": comm.all_gather, "reduce_scatter": comm.reduce_scatter, "all_reduce": comm.all_reduce,
    }[operation](given, label)  # fmt: skip
    return pending.wait()


def _pattern(elements: int, rank: int, sums: bool, device: torch.device, start: int = 0) -> Tensor:
    """What a rank of a group sends: int32. sums: small enough to be added up. start: of a piece of it."""
    numbers = torch.arange(start, start + elements, dtype=torch.int32, device=device)
    return (numbers + rank).remainder_(_ADDED) if sums else (numbers + 7 * rank).remainder_(_MOVED)


def _is_right(operation: str, result: Tensor, own: Tensor, per_rank: int, comm: Comm) -> bool:
    """Whether a rank of the group got what the patterns of all make."""
    device, size, rank = own.device, comm.size, comm.rank
    if operation == "all_gather":
        parts = result.view(size, per_rank)
        return all(_equal(parts[r], _pattern(per_rank, r, False, device)) for r in range(size))
    if operation == "all_to_all":
        parts, start = result.view(size, per_rank), rank * per_rank
        return all(_equal(parts[r], _pattern(per_rank, r, False, device, start)) for r in range(size))
    if operation == "shift":
        return _equal(result, _pattern(len(own), (rank - 1) % size, False, device))
    if operation == "broadcast":
        return _equal(result, _pattern(len(own), 0, False, device))
    if operation == "reduce" and rank != 0:
        return True  # what is left in its buffer is nobody's
    start = rank * per_rank if operation == "reduce_scatter" else 0
    total = torch.zeros(len(result), dtype=torch.int32, device=device)
    for residue in range(min(_ADDED, size)):  # ranks that are alike modulo _ADDED send the same
        total += len(range(residue, size, _ADDED)) * _pattern(len(result), residue, True, device, start)
    return _equal(result, total)


def _equal(result: Tensor, wanted: Tensor) -> bool:
    return torch.equal(result, wanted.to(result.dtype))


def ring_rounds(count: int) -> list[list[tuple[int, int]]]:
    """Pairs of a ring of so many nodes, in rounds in which each node is in one pair at most."""
    if count < 2:
        return []
    if count == 2:
        return [[(0, 1)]]
    pairs = [(i, (i + 1) % count) for i in range(count)]
    rounds = [pairs[0 : count - count % 2 : 2], pairs[1 : count - count % 2 : 2]]
    return [*rounds, [pairs[-1]]] if count % 2 else rounds


def measure_pair(peer: int, num_bytes: int, bench: Bench) -> tuple[float, bool]:
    """(GB/s that this rank receives of `peer`, to which it sends as much meanwhile, whether it is right)."""
    rank = dist.get_rank()
    own, theirs = (_pattern(num_bytes, r, False, bench.device).to(torch.uint8) for r in (rank, peer))

    def exchange(arrived: Tensor) -> Tensor:
        ends = [dist.P2POp(dist.isend, own, peer), dist.P2POp(dist.irecv, arrived, peer)]
        for work in dist.batch_isend_irecv(ends):
            work.wait()
        return arrived

    seconds, arrived = bench.time(lambda: torch.empty_like(own), exchange)
    return 1e-9 * num_bytes / seconds, torch.equal(arrived, theirs)
