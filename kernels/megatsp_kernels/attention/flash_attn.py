"""Attention over one block of keys by the FlashAttention library, where it is installed.

The functions are the library's own inner ones, as its autograd functions call them: ring attention
hands the backward the log-sum-exp of whole rows, which no public function takes. Source: Dao,
FlashAttention-2, arXiv:2307.08691; flash_attn/flash_attn_interface.py of flash-attn 2.7 and 2.8.
"""

import importlib
from typing import Any

from torch import Tensor

from megatsp_kernels.attention import by_tokens


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
    function = _interface()._flash_attn_forward
    return by_tokens.forward(function, q, k, v, causal, scale, softcap=0.0, return_softmax=False)


def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As `sdpa.attention_backward`; deterministic."""
    function = _interface()._flash_attn_backward
    return by_tokens.backward(function, dout, q, k, v, out, lse, causal, scale, softcap=0.0)
