"""Attention over one block of keys by AMD's AITER, where it is installed.

The functions are the library's own inner ones, for the reason given in flash_attn.py. Source:
aiter/ops/mha.py of ROCm/aiter.
"""

import importlib
from typing import Any

import torch
from torch import Tensor

_NO_WINDOW = dict(window_size_left=-1, window_size_right=-1)


def check() -> None:
    """Raises ValueError unless an AITER is installed that has the functions called here."""
    _interface()


def _interface() -> Any:
    try:
        interface = importlib.import_module("aiter.ops.mha")
        assert callable(interface._flash_attn_forward) and callable(interface._flash_attn_backward)
    except (ImportError, AttributeError, AssertionError) as error:
        advice = "needs AMD's AITER with aiter.ops.mha (https://github.com/ROCm/aiter, from source)"
        raise ValueError(f"kernels.attention=aiter {advice}; {error}") from error
    return interface


def attention_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """As `sdpa.attention_forward`."""
    out, lse = _interface()._flash_attn_forward(
        *(t.transpose(1, 2) for t in (q, k, v)),
        dropout_p=0.0, softmax_scale=scale, causal=causal, **_NO_WINDOW, bias=None, alibi_slopes=None,
        return_lse=True, return_softmax=False,
    )[:2]  # fmt: skip
    return out.transpose(1, 2), lse


def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As `sdpa.attention_backward`; deterministic."""
    dout, q, k, v, out = (t.transpose(1, 2) for t in (dout, q, k, v, out))
    dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    _interface()._flash_attn_backward(
        dout, q, k, v, out, lse.contiguous(), dq, dk, dv, dbias=None,
        dropout_p=0.0, softmax_scale=scale, causal=causal, **_NO_WINDOW, bias=None, alibi_slopes=None,
        deterministic=True,
    )  # fmt: skip
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)
