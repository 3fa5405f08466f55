"""Attention of tokens that are all here."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from megatsp.cp.documents import Documents, PackedTokens


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


class CausalAttention(Protocol):
    """Attention of q [B, H, t, d] to k, v [B, K, t, d] of the same tokens, in the order of the sequence.

    A token sees itself and those before it, of its own document alone where `packed` says which.
    """

    def causal_forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, packed: PackedTokens | None
    ) -> tuple[Tensor, Tensor]:
        """out [B, H, t, d] in q's dtype, and the log-sum-exp [B, H, t]: fp32, natural."""

    def causal_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float,
        packed: PackedTokens | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """dq, dk, dv of these tokens' pairs, given the output and log-sum-exp of whole rows."""


class CausalSquares:
    """`CausalAttention` by a library: a call for each document, or for several of equal place."""

    def __init__(self, kernel: BlockAttention) -> None:
        self._kernel = kernel

    def causal_forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, packed: PackedTokens | None
    ) -> tuple[Tensor, Tensor]:
        attention = self._kernel.attention_forward
        if packed is None:
            return attention(q, k, v, True, scale)
        out, lse = _by_tokens(q), q.new_empty(q.shape[:-1], dtype=torch.float32)
        for samples, tokens in packed.squares:
            at = samples, slice(None), tokens
            out[at], lse[at] = attention(q[at], k[at], v[at], True, scale)
        return out, lse

    def causal_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float,
        packed: PackedTokens | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        gradient = self._kernel.attention_backward
        if packed is None:
            return gradient(dout, q, k, v, out, lse, True, scale)
        dq, dk, dv = (_by_tokens(t) for t in (q, k, v))
        for samples, tokens in packed.squares:
            at = samples, slice(None), tokens
            dq[at], dk[at], dv[at] = gradient(dout[at], q[at], k[at], v[at], out[at], lse[at], True, scale)
        return dq, dk, dv


class LocalAttention:
    """A `SequenceAttention` of one rank: nothing is sent, and nothing copied."""

    def __init__(self, kernel: CausalAttention, scale: float) -> None:
        self._kernel, self._scale = kernel, scale

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None
    ) -> tuple[Tensor, Tensor]:
        return self._kernel.causal_forward(q, k, v, self._scale, documents.own if documents else None)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        documents: Documents | None = None,
    ) -> tuple[Tensor, Callable[[], tuple[Tensor, Tensor]]]:  # fmt: skip
        dq, dk, dv = self._kernel.causal_backward(
            dout, q, k, v, out, lse, self._scale, documents.own if documents else None
        )
        return dq, lambda: (dk, dv)


def _by_tokens(like: Tensor) -> Tensor:
    """Empty, of the shape [B, H, t, d] of `like`, in memory [B, t, H, d]: a document's rows lie together."""
    batch, heads, tokens, width = like.shape
    return like.new_empty(batch, tokens, heads, width).transpose(1, 2)
