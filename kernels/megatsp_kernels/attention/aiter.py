"""Attention over one block of keys by AMD's AITER, where it is installed.

The functions are the library's own inner ones, for the reason given in flash_attn.py. Source:
aiter/ops/mha.py of ROCm/aiter.
"""

import importlib
from typing import Any

from torch import Tensor

from megatsp_kernels.attention import by_tokens


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
    function = _interface()._flash_attn_forward
    return by_tokens.forward(
        function, q, k, v, causal, scale, bias=None, return_lse=True, return_softmax=False
    )


def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As `sdpa.attention_backward`; deterministic."""
    function = _interface()._flash_attn_backward
    return by_tokens.backward(function, dout, q, k, v, out, lse, causal, scale, dbias=None, bias=None)
