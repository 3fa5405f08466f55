"""What a rank of the preflight measures: products on its device, transfers in its groups, hops between nodes.

All ranks of a group call these together, in the same order. Whatever travels is a known pattern, of whole
numbers that every dtype holds exactly, sums included; what arrives is held against it.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatsp.comm import Comm
from megatsp.model.parallelize import DTYPES
from megatsp.preflight.transfers import Transfer, bus_bytes
from megatsp.schema import Config

Clock = Callable[[], float]

_FLOPS = {"cuda": 2**42, "cpu": 2**29}  # of one product at most
_PRODUCTS_S = {"cuda": 2.0, "cpu": 0.2}  # of all timings: a GPU slows down when it is warm
_TRANSFERS_S = 0.01  # of one timing, in which a transfer is repeated
_MOST_TIMES = 200
_MOVED, _ADDED = 64, 4  # values of a pattern; bf16 has all sums up to 256, of more ranks than tp has
_SENDERS = 16  # kinds of addends: ranks that are alike modulo it add the same


@dataclass(frozen=True)
class Measured:
    """What one rank measured. right: whether data came out, or arrived, as known. seconds: of one transfer.

    wrong_of: ranks of the group whose data arrived wrong, where that can be told.
    """

    value: float
    right: bool
    seconds: float = 0.0
    wrong_of: tuple[int, ...] = ()


@dataclass(frozen=True)
class Bench:
    """How to time. repeats: timings, of which the median counts. clock: in seconds."""

    device: torch.device
    repeats: int
    clock: Clock = time.perf_counter

    def time(self, work: Callable[[], Any]) -> float:
        """Seconds of `work`, to the end of what it started on a GPU."""
        self.synchronize()
        start = self.clock()
        work()
        self.synchronize()
        return max(self.clock() - start, 1e-9)

    def synchronize(self) -> None:
        """Waits for what was started on a GPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def product_shape(config: Config, device: torch.device) -> tuple[int, int, int]:
    """(rows, h, F) of the product that is measured: the MLP's, of a micro-batch's tokens on this rank."""
    t, p, m = config.trainer, config.parallel, config.model
    tokens = t.micro_batch_size * t.seq_length // (p.cp * p.tsp)
    most = _FLOPS[device.type] // (2 * m.hidden_size * m.ffn_hidden_size)
    return max(1, min(tokens, most)), m.hidden_size, m.ffn_hidden_size


def measure_product(config: Config, bench: Bench) -> Measured:
    """TFLOP/s of this device in the model's dtype; right: the last product, and one of whole numbers."""
    rows, h, ffn = product_shape(config, bench.device)
    dtype, device = DTYPES[config.trainer.dtype], bench.device
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(n, h, generator=generator, device=device).to(dtype) for n in (rows, ffn))
    result = a.new_empty(rows, ffn)

    def multiply(times: int = 1) -> None:
        for _ in range(times):
            torch.mm(a, b.t(), out=result)

    multiply()
    count = max(1, int(_PRODUCTS_S[device.type] / bench.repeats / bench.time(multiply)))
    seconds = statistics.median(bench.time(lambda: multiply(count)) for _ in range(bench.repeats)) / count
    is_near = _row_sums_are_near(result, a, b)
    # Few enough ones that all sums are exact in bf16, in whatever order they are added.
    left, right = (_few_ones(n, h, one_in, generator).to(dtype) for n, one_in in ((rows, 4), (ffn, 16)))
    wanted = left.double() @ right.sum(0, dtype=torch.float64)
    is_exact = torch.equal((left @ right.t()).sum(1, dtype=torch.float64), wanted)
    return Measured(2e-12 * rows * h * ffn / seconds, is_near and is_exact, seconds)


def _row_sums_are_near(product: Tensor, a: Tensor, b: Tensor) -> bool:
    """Whether every row of a @ b.T adds up as it should, within 16 deviations of rounding to bf16."""
    off = product.sum(1, dtype=torch.float64) - a.double() @ b.sum(0, dtype=torch.float64)
    return bool(off.abs().max() <= 2**-5 * b.numel() ** 0.5)  # False for NaN


def _few_ones(rows: int, columns: int, one_in: int, generator: torch.Generator) -> Tensor:
    """Zeros, but of so many one is 1 or -1."""
    drawn = torch.randint(2 * one_in, (rows, columns), generator=generator, device=generator.device)
    return (drawn == 0).int() - (drawn == 1).int()


def measure_transfer(transfer: Transfer, comm: Comm, bench: Bench) -> Measured:
    """Bus bandwidth in GB/s as this rank sees it, and whether what arrived is right; on all ranks of `comm`.

    A timing repeats the transfer until it is long against its start by the host. After each one it is made
    once more with other data, which is what is checked.
    """
    per_rank = -(-transfer.elements // comm.size)
    dtype = DTYPES[transfer.dtype]
    elements = per_rank if transfer.operation == "all_gather" else per_rank * comm.size
    sums = transfer.operation in ("reduce_scatter", "all_reduce", "reduce")

    def given(number: int) -> Tensor:
        return _pattern(elements, comm.rank, number, sums, bench.device).to(dtype)

    def timed(data: Tensor, times: int) -> float:
        def work() -> None:
            for _ in range(times):
                _run(transfer.operation, data, comm)

        bench.synchronize()
        dist.barrier(comm.group)  # all begin together
        return bench.time(work) / times

    timed(given(0), 1)  # to warm up
    times = _times(timed(given(0), 1), comm)
    seconds: list[float] = []
    wrong: set[int] = set()
    right = True
    for number in range(1, bench.repeats + 1):
        seconds.append(timed(given(0), times))
        result = _run(transfer.operation, given(number), comm)
        is_right, wrong_of = _check(transfer.operation, result, per_rank, number, comm)
        right, wrong = right and is_right, wrong | wrong_of
    median = statistics.median(seconds)
    speed = bus_bytes(transfer.operation, per_rank * comm.size * dtype.itemsize, comm.size) / median
    return Measured(1e-9 * speed, right, median, tuple(sorted(wrong)))


def _times(seconds: float, comm: Comm) -> int:
    """How often to repeat what took so long here, on all ranks of the group the same."""
    slowest = [seconds] * comm.size
    dist.all_gather_object(slowest, seconds, group=comm.group)
    return max(1, min(_MOST_TIMES, round(_TRANSFERS_S / max(slowest))))


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


def _pattern(
    elements: int, rank: int, number: int, sums: bool, device: torch.device, start: int = 0
) -> Tensor:
    """What a rank of a group sends the number-th time: int32, a hash of place, rank and number.

    sums: small enough to be added up. start: of a piece of it.
    """
    seed = (rank % _SENDERS if sums else rank) * 0x5851F42D + number * 0x14057B7F
    hashed = torch.arange(start, start + elements, dtype=torch.int32, device=device)
    hashed.add_(_int32(seed)).mul_(_int32(0x9E3779B1))  # it wraps around
    hashed.bitwise_xor_(hashed >> 15).mul_(_int32(0x85EBCA6B))
    return hashed.bitwise_right_shift_(16).bitwise_and_((_ADDED if sums else _MOVED) - 1)


def _int32(number: int) -> int:
    """The number modulo 2^32, as int32 has it."""
    return (number + 2**31) % 2**32 - 2**31


def _check(operation: str, result: Tensor, per_rank: int, number: int, comm: Comm) -> tuple[bool, set[int]]:
    """Whether a rank of the group got what the patterns of all make; and whose part is wrong, if known."""
    device, size, rank = result.device, comm.size, comm.rank
    length = len(result)
    if operation in ("all_gather", "all_to_all"):
        start = rank * per_rank if operation == "all_to_all" else 0
        parts = enumerate(result.view(size, per_rank))
        wrong = {
            r for r, part in parts if not _equal(part, _pattern(per_rank, r, number, False, device, start))
        }
        return not wrong, wrong
    if operation == "broadcast":
        right = _equal(result, _pattern(length, 0, number, False, device))
        return right, set() if right else {0}
    if operation == "shift":  # to tell sender and receiver apart it takes another receiver
        return _equal(result, _pattern(length, (rank - 1) % size, number, False, device)), set()
    if operation == "reduce" and rank != 0:
        return True, set()  # what is left in its buffer is nobody's
    start = rank * per_rank if operation == "reduce_scatter" else 0
    total = torch.zeros(length, dtype=torch.int32, device=device)
    for kind in range(min(_SENDERS, size)):
        total += len(range(kind, size, _SENDERS)) * _pattern(length, kind, number, True, device, start)
    return _equal(result, total), set()


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
