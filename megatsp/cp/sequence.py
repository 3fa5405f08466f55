"""Attention over a sequence that a group of ranks shares: the choice of the exchange."""

from collections.abc import Callable
from functools import partial
from typing import Protocol

from megatsp_kernels.attention import attention_backward, attention_forward
from torch import Tensor

from megatsp.comm import Comm
from megatsp.cp.allgather import AllGatherExchange
from megatsp.cp.blockwise import BlockwiseAttention
from megatsp.cp.hierarchical import HierarchicalExchange
from megatsp.cp.ring import RingExchange
from megatsp.cp.ulysses import UlyssesAttention


class SequenceAttention(Protocol):
    """softmax(q k^T scale) v, causal by global position, of tokens shared by S ranks in zigzag chunks."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """q: [B, H, T/S, d]; k, v: [B, K, T/S, d], K dividing H.

        Returns out [B, H, T/S, d] in q's dtype, and the log-sum-exp in a layout that `backward` alone
        need understand.
        """

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Callable[[], tuple[Tensor, Tensor]]]:
        """Gradients of forward, given its results: dq, and a call that waits for dk and dv.

        They are fp32, or as the kernel gave them, in q's dtype, where nothing is added up. Between the
        two the gradients of keys and values travel: there is time to compute.
        """


class LocalAttention:
    """A `SequenceAttention` of one rank: nothing is sent, and nothing copied."""

    def __init__(self, scale: float) -> None:
        self._scale = scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return attention_forward(q, k, v, True, self._scale)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Callable[[], tuple[Tensor, Tensor]]]:
        dq, dk, dv = attention_backward(dout, q, k, v, out, lse, True, self._scale)
        return dq, lambda: (dk, dv)


def sequence_attention(
    exchange: str, sequence: Comm, outer: Comm, inner: Comm, scale: float
) -> SequenceAttention:
    """Attention over the ranks of `sequence`.

    Args:
        exchange: allgather, ring, ulysses or hierarchical.
        sequence: the whole group, S = C D ranks; rank s holds the zigzag chunks s and 2S-1-s.
        outer, inner: the C ranks of its cp axis and the D of its tsp axis: s is D outer.rank +
            inner.rank. They matter to `hierarchical` alone.
        scale: of the scores.
    """
    assert sequence.size == outer.size * inner.size
    assert sequence.rank == outer.rank * inner.size + inner.rank
    if sequence.size == 1:
        return LocalAttention(scale)
    if exchange == "ulysses":
        return UlyssesAttention(sequence, scale)
    if exchange == "hierarchical" and 1 in (outer.size, inner.size):  # then it is its other level
        exchange = "allgather" if outer.size == 1 else "ring"
    if exchange == "allgather":
        return BlockwiseAttention(partial(AllGatherExchange, sequence), scale)
    if exchange == "ring":
        return BlockwiseAttention(partial(RingExchange, sequence), scale)
    assert exchange == "hierarchical"
    return BlockwiseAttention(partial(HierarchicalExchange, outer, inner), scale)
