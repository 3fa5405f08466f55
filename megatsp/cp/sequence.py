"""Attention over a sequence that a group of ranks shares: the choice of the exchange."""

from collections.abc import Callable
from functools import partial
from typing import Protocol

from torch import Tensor

from megatsp.comm import Comm
from megatsp.cp.allgather import AllGatherExchange
from megatsp.cp.blockwise import BlockwiseAttention
from megatsp.cp.documents import Documents
from megatsp.cp.exchange import Exchange
from megatsp.cp.fused import FusedBlock, RingAttention
from megatsp.cp.hierarchical import HierarchicalExchange
from megatsp.cp.local import BlockAttention, CausalSquares, LocalAttention
from megatsp.cp.ring import RingExchange
from megatsp.cp.ulysses import UlyssesAttention


class SequenceAttention(Protocol):
    """softmax(q k^T scale) v, causal by global position, of tokens shared by S ranks in zigzag chunks.

    documents: of the batch, where they do not see each other; None: a sample is one document.
    """

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None
    ) -> tuple[Tensor, Tensor]:
        """q: [B, H, T/S, d]; k, v: [B, K, T/S, d], K dividing H.

        Returns out [B, H, T/S, d] in q's dtype, and the log-sum-exp in a layout that `backward` alone
        need understand.
        """

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        documents: Documents | None = None,
    ) -> tuple[Tensor, Callable[[], tuple[Tensor, Tensor]]]:  # fmt: skip
        """Gradients of forward, given its results: dq, and a call that waits for dk and dv.

        They are fp32, or as the kernel gave them, in q's dtype, where nothing is added up. Between the
        two the gradients of keys and values travel: there is time to compute.
        """


def sequence_attention(
    exchange: str,
    sequence: Comm,
    outer: Comm,
    inner: Comm,
    scale: float,
    kernel: BlockAttention | FusedBlock,
) -> SequenceAttention:
    """Attention over the ranks of `sequence`.

    Args:
        exchange: allgather, ring, ulysses or hierarchical.
        sequence: the whole group, S = C D ranks; rank s holds the zigzag chunks s and 2S-1-s.
        outer, inner: the C ranks of its cp axis and the D of its tsp axis: s is D outer.rank +
            inner.rank. They matter to `hierarchical` alone.
        scale: of the scores.
        kernel: a library's, that computes a block; or ours, which knows positions and carries its state
            from block to block.
    """
    assert sequence.size == outer.size * inner.size
    assert sequence.rank == outer.rank * inner.size + inner.rank
    causal = kernel if isinstance(kernel, FusedBlock) else CausalSquares(kernel)
    if sequence.size == 1:
        return LocalAttention(causal, scale)
    if exchange == "ulysses":
        return UlyssesAttention(sequence, causal, scale)
    if exchange == "hierarchical" and 1 in (outer.size, inner.size):  # then it is its other level
        exchange = "allgather" if outer.size == 1 else "ring"
    exchanges: dict[str, Callable[[Tensor, str], Exchange]] = {
        "allgather": partial(AllGatherExchange, sequence),
        "ring": partial(RingExchange, sequence),
        "hierarchical": partial(HierarchicalExchange, outer, inner),
    }
    if isinstance(kernel, FusedBlock):
        return RingAttention(exchanges[exchange], sequence, scale)
    return BlockwiseAttention(exchanges[exchange], sequence, kernel, scale)
