"""Attention over one block of keys by the FlashAttention library, where it is installed.

The functions are the library's own inner ones, as its autograd functions call them: ring attention
hands the backward the log-sum-exp of whole rows, which no public function takes. Source: Dao,
FlashAttention-2, arXiv:2307.08691; flash_attn/flash_attn_interface.py of flash-attn 2.7 and 2.8.
"""

import importlib
from typing import Any

import torch
from torch import Tensor

_NO_WINDOW = dict(window_size_left=-1, window_size_right=-1)


def check() -> None:
    """Raises ValueError unless a flash-attn is installed whose functions are those called here."""
    _interface()


def _interface() -> Any:
    advice = "needs flash-attn 2.7 or 2.8 (pip install flash-attn --no-build-isolation)"
    try:
        library = importlib.import_module("flash_attn")
        version = str(library.__version__)
        interface = importlib.import_module("flash_attn.flash_attn_interface")
    except (ImportError, AttributeError) as error:
        raise ValueError(f"kernels.attention=flash_attn {advice}; {error}") from error
    if tuple(version.split(".")[:2]) not in (("2", "7"), ("2", "8")):
        raise ValueError(f"kernels.attention=flash_attn {advice}; found {version}")
    return interface


def attention_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """As `sdpa.attention_forward`."""
    out, lse = _interface()._flash_attn_forward(
        *(t.transpose(1, 2) for t in (q, k, v)),
        dropout_p=0.0, softmax_scale=scale, causal=causal, **_NO_WINDOW, softcap=0.0, alibi_slopes=None,
        return_softmax=False,
    )[:2]  # fmt: skip
    return out.transpose(1, 2), lse


def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As `sdpa.attention_backward`; deterministic."""
    dout, q, k, v, out = (t.transpose(1, 2) for t in (dout, q, k, v, out))
    dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    _interface()._flash_attn_backward(
        dout, q, k, v, out, lse.contiguous(), dq, dk, dv,
        dropout_p=0.0, softmax_scale=scale, causal=causal, **_NO_WINDOW, softcap=0.0, alibi_slopes=None,
        deterministic=True,
    )  # fmt: skip
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)
