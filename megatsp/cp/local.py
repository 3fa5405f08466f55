"""Attention of tokens that are all here."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor


class BlockAttention(Protocol):
    """A library's flash attention of one block of keys: `megatsp_kernels.attention` has them, one a module.

    q: [B, H, Tq, d]; k, v: [B, K, Tk, d], K dividing H; causal: query i sees the keys 0..i.
    """

    def attention_forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        """out [B, H, Tq, d] in q's dtype, and the log-sum-exp [B, H, Tq]: fp32, natural."""

    def attention_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """dq, dk, dv of one block, given the output and log-sum-exp of whole rows."""


class LocalAttention:
    """A `SequenceAttention` of one rank: nothing is sent, and nothing copied."""

    def __init__(self, kernel: BlockAttention, scale: float) -> None:
        self._kernel, self._scale = kernel, scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self._kernel.attention_forward(q, k, v, True, self._scale)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Callable[[], tuple[Tensor, Tensor]]]:
        dq, dk, dv = self._kernel.attention_backward(dout, q, k, v, out, lse, True, self._scale)
        return dq, lambda: (dk, dv)
