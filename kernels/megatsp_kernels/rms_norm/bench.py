"""RMSNorm against torch's own kernels, compiled ones, apex's and Liger's."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatsp_kernels.benchmark import Benchmark, when_importable
from megatsp_kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_backward
from megatsp_kernels.rms_norm.reference import add_rms_norm as add_reference
from megatsp_kernels.rms_norm.reference import rms_norm as reference

EPSILON = 1e-5
Rival = Callable[[Tensor], Tensor]


def benchmarks(smoke: bool = False) -> Iterator[Benchmark]:
    """16K local tokens of 7B and of 70B, and 8 heads of 128 over as many; smoke: for the interpreter."""
    dtype = torch.float16 if smoke else torch.bfloat16
    sizes = [(7, 33)] if smoke else [(16384, 4096), (16384, 8192), (8 * 16384, 128)]
    for rows, columns in sizes:
        # Read and written once. Backward: dy, x and the residual's gradient in, dx in fp32 out.
        for name, make, item_bytes in (
            ("forward", _forward, 2 * dtype.itemsize),
            ("add", _add, 4 * dtype.itemsize),
            ("backward", _backward, 3 * dtype.itemsize + 4),
        ):
            moved, shape = rows * columns * item_bytes, dict(rows=rows, columns=columns)
            yield Benchmark(f"rms_norm/{name}", shape, dtype, 0, moved, partial(make, rows, columns, dtype))


def _inputs(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, columns, device=device, dtype=dtype), torch.randn(columns, device=device)


def _rivals(gain: Tensor, dtype: torch.dtype) -> dict[str, Rival | str]:
    """Whole functions of x, by name; apex and Liger where the package has theirs: PyPI's apex does not."""
    low = gain.to(dtype)
    compiled = torch.compile(reference)

    def apex(module: Any) -> Rival:
        return module.FusedRMSNorm(gain.shape[0], eps=EPSILON).to(gain.device, dtype)

    def liger(module: Any) -> Rival:
        # Gain's offset 0, Llama's casts, dx not over dy.
        return lambda x: module.LigerRMSNormFunction.apply(x, low, EPSILON, 0.0, "llama", False)

    return {
        "torch": lambda x: reference(x, gain, EPSILON),
        "torch.compile": lambda x: compiled(x, gain, EPSILON),
        "torch.fused": lambda x: torch.nn.functional.rms_norm(x, low.shape, low, EPSILON),
        "apex": when_importable("apex.normalization", apex),
        "liger": when_importable("liger_kernel.ops.rms_norm", liger),
    }


def _forward(
    rows: int, columns: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Callable[[], Any] | str]:
    x, gain = _inputs(rows, columns, dtype, device)
    runs: dict[str, Callable[[], Any] | str] = {"megatsp": lambda: rms_norm(x, gain, EPSILON)}
    for name, rival in _rivals(gain, dtype).items():
        runs[name] = rival if isinstance(rival, str) else partial(rival, x)
    return runs


def _add(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> dict[str, Callable[[], Any]]:
    x, gain = _inputs(rows, columns, dtype, device)
    update, compiled = torch.randn_like(x), torch.compile(add_reference)
    return {
        "megatsp": lambda: add_rms_norm(x, update, gain, EPSILON),
        "torch": lambda: add_reference(x, update, gain, EPSILON),
        "torch.compile": lambda: compiled(x, update, gain, EPSILON),
    }


def _backward(
    rows: int, columns: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Callable[[], Any] | str]:
    """Rivals add the residual's gradient after theirs of x."""
    x, gain = _inputs(rows, columns, dtype, device)
    dy, dresidual = torch.randn_like(x), torch.randn_like(x)
    leaf = x.clone().requires_grad_()
    gain.requires_grad_()

    def timed(y: Tensor) -> Callable[[], Tensor]:
        wanted = dict(retain_graph=True, allow_unused=True)  # apex's gain is a parameter of its own
        return lambda: torch.autograd.grad(y, [leaf, gain], dy, **wanted)[0].float() + dresidual

    runs: dict[str, Callable[[], Any] | str] = {
        "megatsp": lambda: rms_norm_backward(dy, x, gain.detach(), EPSILON, dresidual)
    }
    for name, rival in _rivals(gain, dtype).items():
        runs[name] = rival if isinstance(rival, str) else timed(rival(leaf))
    return runs
