"""Rotary position embedding against torch's own kernels, compiled ones and Liger's."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatsp_kernels.benchmark import Benchmark, when_importable
from megatsp_kernels.rotary import rotate
from megatsp_kernels.rotary.reference import rotate as reference


def benchmarks(smoke: bool = False) -> Iterator[Benchmark]:
    """A bucket of 8 heads of 7B over 16K local tokens; smoke: a size for the interpreter.

    Forward: a view of projected columns, as attention reads it. Backward: fp32 gradients into such a view.
    """
    heads, tokens, width = (3, 7, 10) if smoke else (8, 16384, 128)
    dtype = torch.float16 if smoke else torch.bfloat16
    shape, elements = dict(heads=heads, tokens=tokens, width=width), heads * tokens * width
    table = 4 * tokens * width  # cosines and sines: fp32 [tokens, width / 2] each
    for name, make, item_bytes in (
        ("forward", _forward, 2 * dtype.itemsize),
        ("backward", _backward, 4 + dtype.itemsize),
    ):
        moved = elements * item_bytes + table
        yield Benchmark(f"rotary/{name}", shape, dtype, 0, moved, partial(make, heads, tokens, width, dtype))


def _table(tokens: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    angles = torch.rand(tokens, width // 2, device=device)
    return angles.cos(), angles.sin()


def _forward(
    heads: int, tokens: int, width: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Callable[[], Any] | str]:
    projected = torch.randn(1, tokens, 3 * heads, width, device=device, dtype=dtype)
    x, (cos, sin) = projected[:, :, :heads].transpose(1, 2), _table(tokens, width, device)
    compiled = torch.compile(reference)

    def liger(module: Any) -> Callable[[], Any]:
        # It rotates two tensors at once, with angles for whole heads [1, T, d]: half of the heads each.
        whole = [torch.cat([t, t], -1)[None] for t in (cos, sin)]
        return lambda: module.LigerRopeFunction.apply(*x.chunk(2, 1), *whole)

    return {
        "megatsp": lambda: rotate(x, cos, sin),
        "torch": lambda: reference(x, cos, sin),
        "torch.compile": lambda: compiled(x, cos, sin),
        "liger": when_importable("liger_kernel.ops.rope", liger),
    }


def _backward(
    heads: int, tokens: int, width: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Callable[[], Any]]:
    dout = torch.randn(1, heads, tokens, width, device=device)
    columns = torch.empty(1, tokens, 3 * heads, width, device=device, dtype=dtype)
    dx, (cos, sin) = columns[:, :, :heads].transpose(1, 2), _table(tokens, width, device)
    compiled = torch.compile(reference)
    return {
        "megatsp": lambda: rotate(dout, cos, sin, inverse=True, out=dx),
        "torch": lambda: dx.copy_(reference(dout, cos, sin, inverse=True)),
        "torch.compile": lambda: dx.copy_(compiled(dout, cos, sin, inverse=True)),
    }
