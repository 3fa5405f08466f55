"""Streamed products against torch.mm, alone and with a transfer beside them, between simulated peers.

The peers' buffers are all on the one GPU: what is measured is how much a product suffers from the programs
and the memory traffic of a transfer, not the links.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from megatsp_kernels.benchmark import Benchmark
from megatsp_kernels.peers import local
from megatsp_kernels.streamed.exchange import Exchange, layout_for
from megatsp_kernels.streamed.op import Pull, matmul_pull, matmul_scatter, publish, pull, reduce

Timed = dict[str, Callable[[], Any]]


def benchmarks(smoke: bool = False) -> Iterator[Benchmark]:
    """One bucket of 7B's MLP (gate and up, of three matrices) over 16K local tokens on 8 ranks."""
    ranks, tokens, h, columns = (2, 7, 10, 6) if smoke else (8, 16384, 4096, 2048)
    dtype = torch.float16 if smoke else torch.bfloat16
    shape = dict(ranks=ranks, tokens=tokens, h=h, columns=columns)
    sizes, size = (ranks, tokens, h, columns, dtype), dtype.itemsize
    flops = 2 * tokens * h * 2 * columns
    factors = size * (tokens * h + h * 2 * columns + tokens * 2 * columns)
    bucket, gradient = h * 3 * columns * size, h * 2 * columns * 4
    yield Benchmark("streamed/matmul", shape, dtype, flops, factors, partial(_matmul, *sizes))
    yield Benchmark(
        "streamed/matmul_pull", shape, dtype, flops, factors + 2 * bucket, partial(_matmul_pull, *sizes)
    )
    yield Benchmark("streamed/pull", shape, dtype, 0, 2 * bucket, partial(_pull, *sizes))
    # A slice is read in fp32 and written in the compute dtype.
    slice_bytes = h // ranks * 3 * columns * (4 + size)
    yield Benchmark("streamed/publish", shape, dtype, 0, slice_bytes, partial(_publish, *sizes))
    scattered = size * (tokens * h + tokens * 2 * columns) + gradient
    yield Benchmark("streamed/matmul_scatter", shape, dtype, flops, scattered, partial(_scatter, *sizes))
    reduced = gradient // ranks * (ranks + 1)
    yield Benchmark("streamed/reduce", shape, dtype, 0, reduced, partial(_reduce, *sizes))


class _Group:
    """Simulated peers, of which all have published once: everyone's flags say so from then on."""

    def __init__(self, ranks: int, h: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
        rows = h // ranks
        layout = layout_for(ranks, rows * 3 * columns * dtype.itemsize, rows * 2 * columns * 4, device)
        memories = local(layout.num_bytes, ranks, device)
        self.exchanges = [Exchange(memory, layout) for memory in memories]
        self.peers = self.exchanges[0].peers
        # Two weights lie the other way round, as gate and up do.
        self.slice = [torch.randn(columns, rows, device=device).t() for _ in range(2)]
        self.slice.append(torch.randn(rows, columns, device=device))
        for exchange in self.exchanges:
            publish(exchange.peers, 1, self.slice, dtype)
        self.job = Pull(self.peers, 1, torch.empty(h, 3 * columns, device=device, dtype=dtype))


def _factors(
    tokens: int, h: int, columns: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens [n, h], gate and up [h, m] in a bucket, and a gradient [n, m]."""
    bucket = torch.randn(h, 3 * columns, device=device).to(dtype)
    rows = torch.randn(tokens, h, device=device).to(dtype)
    return rows, bucket[:, : 2 * columns], torch.randn(tokens, 2 * columns, device=device).to(dtype)


def _matmul(ranks: int, tokens: int, h: int, columns: int, dtype: torch.dtype, device: torch.device) -> Timed:
    rows, weights, _ = _factors(tokens, h, columns, dtype, device)
    return {"megatsp": lambda: matmul_pull(rows, weights), "torch": lambda: rows @ weights}


def _matmul_pull(
    ranks: int, tokens: int, h: int, columns: int, dtype: torch.dtype, device: torch.device
) -> Timed:
    rows, weights, _ = _factors(tokens, h, columns, dtype, device)
    group = _Group(ranks, h, columns, dtype, device)

    def one_after_another() -> None:
        pull(group.job)
        torch.mm(rows, weights)

    return {"megatsp": lambda: matmul_pull(rows, weights, group.job), "torch after a pull": one_after_another}


def _pull(ranks: int, tokens: int, h: int, columns: int, dtype: torch.dtype, device: torch.device) -> Timed:
    group = _Group(ranks, h, columns, dtype, device)
    source = torch.empty_like(group.job.landing)
    return {"megatsp": lambda: pull(group.job), "torch": lambda: group.job.landing.copy_(source)}


def _publish(
    ranks: int, tokens: int, h: int, columns: int, dtype: torch.dtype, device: torch.device
) -> Timed:
    group = _Group(ranks, h, columns, dtype, device)
    out = torch.empty(h // ranks, 3 * columns, device=device, dtype=dtype)

    def copies() -> None:
        for target, source in zip(out.chunk(3, 1), group.slice, strict=True):
            target.copy_(source)

    return {"megatsp": lambda: publish(group.peers, 1, group.slice, dtype), "torch": copies}


def _scatter(
    ranks: int, tokens: int, h: int, columns: int, dtype: torch.dtype, device: torch.device
) -> Timed:
    rows, _, gradient = _factors(tokens, h, columns, dtype, device)
    peers = _Group(ranks, h, columns, dtype, device).peers
    return {
        "megatsp": lambda: matmul_scatter(rows.t(), gradient, peers, 1, 0, 0, 2 * columns),
        "torch": lambda: rows.t() @ gradient,
    }


def _reduce(ranks: int, tokens: int, h: int, columns: int, dtype: torch.dtype, device: torch.device) -> Timed:
    peers = _Group(ranks, h, columns, dtype, device).peers
    outs = [torch.empty(columns, h // ranks, device=device).t() for _ in range(2)]
    staged = torch.zeros(ranks, h // ranks, 2 * columns, device=device)
    return {"megatsp": lambda: reduce(peers, 1, 0, outs), "torch": lambda: staged.sum(0)}
