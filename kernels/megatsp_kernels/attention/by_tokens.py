"""Calls of libraries whose attention takes [B, T, H, d], without dropout, window or slopes; deterministic."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_PLAIN = dict(dropout_p=0.0, window_size_left=-1, window_size_right=-1, alibi_slopes=None)


def forward(
    function: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, **options: Any
) -> tuple[Tensor, Tensor]:
    """As `sdpa.attention_forward`; options: the library's own."""
    inputs = (t.transpose(1, 2) for t in (q, k, v))
    out, lse = function(*inputs, softmax_scale=scale, causal=causal, **_PLAIN, **options)[:2]
    return out.transpose(1, 2), lse


def backward(
    function: Callable[..., Any], dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    causal: bool, scale: float, **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As `sdpa.attention_backward`; options: the library's own."""
    dout, q, k, v, out = (t.transpose(1, 2) for t in (dout, q, k, v, out))
    dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    function(
        dout, q, k, v, out, lse.contiguous(), dq, dk, dv,
        softmax_scale=scale, causal=causal, deterministic=True, **_PLAIN, **options,
    )  # fmt: skip
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)
