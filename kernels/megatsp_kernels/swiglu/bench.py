"""SwiGLU against torch's own kernels, and the same compiled by torch."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from megatsp_kernels.benchmark import Benchmark
from megatsp_kernels.swiglu import swiglu, swiglu_backward
from megatsp_kernels.swiglu.reference import swiglu as reference


def benchmarks(smoke: bool = False) -> Iterator[Benchmark]:
    """One bucket of 7B's MLP over 16K local tokens; smoke: a size for the interpreter."""
    rows, columns = (7, 40) if smoke else (16384, 2048)
    dtype = torch.float16 if smoke else torch.bfloat16
    shape, elements = dict(rows=rows, columns=columns), rows * columns
    forward, backward = partial(_forward, rows, columns, dtype), partial(_backward, rows, columns, dtype)
    # Two columns in and one out; backward: three in, three out.
    yield Benchmark("swiglu/forward", shape, dtype, 0, 3 * elements * dtype.itemsize, forward)
    yield Benchmark("swiglu/backward", shape, dtype, 0, 6 * elements * dtype.itemsize, backward)


def _forward(
    rows: int, columns: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Callable[[], Any]]:
    gate_up = torch.randn(rows, 2 * columns, device=device, dtype=dtype)
    compiled = torch.compile(reference)
    return {
        "megatsp": lambda: swiglu(gate_up),
        "torch": lambda: reference(gate_up),
        "torch.compile": lambda: compiled(gate_up),
    }


def _backward(
    rows: int, columns: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Callable[[], Any]]:
    gate_up = torch.randn(rows, 2 * columns, device=device, dtype=dtype, requires_grad=True)
    dout = torch.randn(rows, columns, device=device, dtype=dtype)
    plain = reference(gate_up)
    return {
        "megatsp": lambda: swiglu_backward(dout, gate_up.detach()),
        "torch": lambda: torch.autograd.grad(plain, gate_up, dout, retain_graph=True),
    }
