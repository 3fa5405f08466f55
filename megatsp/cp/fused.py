"""Causal attention over the whole sequence by the kernel that knows positions and carries its state.

Keys and values are read where they landed, in whatever order: every chunk has its position. The
output, the running maximum and the sum go from one arrival to the next inside the kernel, in fp32; nothing
is merged afterwards, and blocks that are not seen are never visited.
"""

from collections.abc import Callable

import torch
from megatsp_kernels.attention import (
    AttentionState,
    attention_backward_step,
    attention_delta,
    attention_step,
)
from torch import Tensor

from megatsp.comm import Comm
from megatsp.cp.documents import Documents, PackedTokens
from megatsp.cp.exchange import Arrival, Exchange

_ABSENT = -1  # position of a chunk that is not to be seen


class FusedBlock:
    """A `CausalAttention`; gradients are fp32."""

    def causal_forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, packed: PackedTokens | None
    ) -> tuple[Tensor, Tensor]:
        start, first = _start(q), packed.first if packed else None
        result = attention_step(q, k[None], v[None], start, start, scale, q_first=first)
        assert isinstance(result, tuple)
        return result

    def causal_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float,
        packed: PackedTokens | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        start, first, delta = _start(q), packed.first if packed else None, attention_delta(out, dout)
        dq, dk, dv = attention_backward_step(
            dout, q, k[None], v[None], lse, delta, start, start, scale, q_first=first
        )
        return dq, dk[0], dv[0]


class RingAttention:
    """softmax(q k^T scale) v over the S > 1 ranks of `comm`: a `SequenceAttention`.

    exchange: posts the exchange of keys and values [2, B, K, T/S, d] under a traffic label.
    """

    def __init__(self, exchange: Callable[[Tensor, str], Exchange], comm: Comm, scale: float) -> None:
        self._exchange, self._comm, self._scale = exchange, comm, scale
        self._positions: dict[tuple[int, int, int], Tensor] = {}

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `SequenceAttention.forward`; the log-sum-exp is [B, H, T/S] in fp32."""
        kv = torch.stack([k, v])
        exchange, own = self._exchange(kv, "kv/forward"), self._own(kv)
        first = documents.own.first if documents else None
        result = attention_step(q, kv[None, 0], kv[None, 1], own, own, self._scale, last=False, q_first=first)
        for i, arrival in enumerate(exchange.arrivals(), 1):
            assert isinstance(result, AttentionState)
            keys, values = arrival.kv.unbind(1)
            result = attention_step(
                q, keys, values, own, self._others(arrival), self._scale, result,
                last=i == exchange.count, q_first=first,
            )  # fmt: skip
            del arrival, keys, values  # before the next ones arrive
        assert isinstance(result, tuple)
        return result

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        documents: Documents | None = None,
    ) -> tuple[Tensor, Callable[[], tuple[Tensor, Tensor]]]:  # fmt: skip
        """As `SequenceAttention.backward`; all gradients are fp32."""
        kv = torch.stack([k, v])
        exchange, own, delta = self._exchange(kv, "kv/backward"), self._own(kv), attention_delta(out, dout)
        first = documents.own.first if documents else None
        dkv = torch.zeros_like(kv[None], dtype=torch.float32)
        dq, _, _ = attention_backward_step(
            dout, q, kv[None, 0], kv[None, 1], lse, delta, own, own, self._scale,
            q_first=first, dk=dkv[:, 0], dv=dkv[:, 1],
        )  # fmt: skip
        for arrival in exchange.arrivals():
            gradient = torch.zeros_like(arrival.kv, dtype=torch.float32)
            keys, values = arrival.kv.unbind(1)
            attention_backward_step(
                dout, q, keys, values, lse, delta, own, self._others(arrival), self._scale,
                dq=dq, q_first=first, dk=gradient[:, 0], dv=gradient[:, 1],
            )  # fmt: skip
            del arrival, keys, values
            exchange.send(gradient)
            del gradient

        def arrived() -> tuple[Tensor, Tensor]:
            dk, dv = exchange.total(dkv[0]).unbind()
            return dk, dv

        return dq, arrived

    def _own(self, kv: Tensor) -> Tensor:
        """Positions of this rank's two chunks: int64 [2]."""
        return self._starts(self._comm.rank, 1, kv)

    def _others(self, arrival: Arrival) -> Tensor:
        """Positions of the chunks of an arrival, without this rank's: int64 [2 n]."""
        return self._starts(arrival.first, arrival.kv.shape[0], arrival.kv)

    def _starts(self, first: int, count: int, kv: Tensor) -> Tensor:
        tokens, size, rank = kv.shape[-2], self._comm.size, self._comm.rank
        if (first, count, tokens) not in self._positions:
            starts = [
                _ABSENT if r == rank and count > 1 else chunk * (tokens // 2)
                for r in range(first, first + count)
                for chunk in (r, 2 * size - 1 - r)
            ]
            self._positions[first, count, tokens] = torch.tensor(starts, device=kv.device)
        return self._positions[first, count, tokens]


def _start(q: Tensor) -> Tensor:
    """The position of one chunk that begins the sequence."""
    return torch.zeros(1, dtype=torch.int64, device=q.device)
