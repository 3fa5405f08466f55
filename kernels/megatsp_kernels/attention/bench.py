"""Causal attention against torch's flash and cuDNN kernels, flash-attn and aiter."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from megatsp_kernels.attention.op import attention, attention_backward_step, attention_delta, attention_step
from megatsp_kernels.benchmark import Benchmark, when_importable

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
_BACKENDS = {"torch flash": SDPBackend.FLASH_ATTENTION, "torch cudnn": SDPBackend.CUDNN_ATTENTION}
_PACKAGES = ("flash_attn", "aiter")  # both: flash_attn_func on [B, T, H, d]


def benchmarks(smoke: bool = False) -> Iterator[Benchmark]:
    """One sequence of 32 heads, 8K and 16K tokens; smoke: a size for the interpreter."""
    heads, d = (2, 16) if smoke else (32, 128)
    dtype = torch.float16 if smoke else torch.bfloat16
    for tokens in (9,) if smoke else (8192, 16384):
        shape = dict(tokens=tokens, heads=heads, d=d)
        pairs = heads * tokens * (tokens + 1) // 2
        one = heads * tokens * d * dtype.itemsize  # a tensor of q's size
        rows = heads * tokens * 4
        # Scores and output. Read: q, k, v; written: out and the log-sum-exp.
        forward = partial(_forward, shape, dtype)
        yield Benchmark("attention/forward", shape, dtype, 4 * d * pairs, 4 * one + rows, forward)
        # Scores again, and the gradients of weights, q, k and v. Read: q, k, v, out, dout, log-sum-exp;
        # written: three gradients in fp32.
        fp32 = 4 * heads * tokens * d
        backward = partial(_backward, shape, dtype)
        yield Benchmark(
            "attention/backward", shape, dtype, 10 * d * pairs, 5 * one + rows + 3 * fp32, backward
        )


def _inputs(shape: dict[str, int], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """q, k, v and dout [1, H, T, d]."""
    size = 1, shape["heads"], shape["tokens"], shape["d"]
    return tuple(torch.randn(size, device=device, dtype=dtype) for _ in range(4))


def _forward(
    shape: dict[str, int], dtype: torch.dtype, device: torch.device
) -> dict[str, Callable[[], Any] | str]:
    q, k, v, _ = _inputs(shape, dtype, device)
    scale = shape["d"] ** -0.5
    runs: dict[str, Callable[[], Any] | str] = {"megatsp": lambda: attention(q, k, v, scale)}
    for name, rival in _rivals(q, k, v).items():
        runs[name] = rival if isinstance(rival, str) else partial(rival, q, k, v)
    return runs


def _backward(
    shape: dict[str, int], dtype: torch.dtype, device: torch.device
) -> dict[str, Callable[[], Any] | str]:
    q, k, v, dout = _inputs(shape, dtype, device)
    scale, start = shape["d"] ** -0.5, torch.zeros(1, dtype=torch.int64, device=device)
    results = attention_step(q, k[None], v[None], start, start, scale)
    assert isinstance(results, tuple)
    out, lse = results

    def ours() -> Any:
        delta = attention_delta(out, dout)
        return attention_backward_step(dout, q, k[None], v[None], lse, delta, start, start, scale)

    runs: dict[str, Callable[[], Any] | str] = {"megatsp": ours}
    leaves = [t.requires_grad_() for t in (q.clone(), k.clone(), v.clone())]
    for name, rival in _rivals(q, k, v).items():
        if isinstance(rival, str):
            runs[name] = rival
            continue
        result = rival(*leaves)
        runs[name] = partial(torch.autograd.grad, result, leaves, dout, retain_graph=True)
    return runs


def _rivals(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Attention | str]:
    """By name; a text says why one does not run on these inputs."""
    rivals: dict[str, Attention | str] = {name: partial(_torch, b) for name, b in _BACKENDS.items()}
    for package in _PACKAGES:
        rivals[package] = when_importable(package, lambda m: partial(_by_tokens, m.flash_attn_func))
    return {
        name: rival if isinstance(rival, str) else _running(rival, q, k, v) for name, rival in rivals.items()
    }


def _torch(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(q, k, v, is_causal=True)


def _by_tokens(function: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return function(q, k, v, causal=True).transpose(1, 2)


def _running(rival: Attention, q: Tensor, k: Tensor, v: Tensor) -> Attention | str:
    """torch has no better way to say that a backend does not take a chip or a dtype than to try it."""
    try:
        rival(q, k, v)
    except RuntimeError as error:
        return f"does not run: {error}".splitlines()[0]
    return rival
