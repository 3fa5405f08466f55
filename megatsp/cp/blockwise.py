"""Causal attention of local queries over the whole sequence, one block of keys after another.

Queries, keys and values are sharded over the sequence in zigzag chunks. Keys and values
cross the group unexpanded, in one of several exchanges; partial outputs merge by their
log-sum-exp, in fp32. A rank's own tokens are causal squares, one a document, attended to while
the others' are on the wire; of every other block each query sees a range of keys that many share, and
what is not seen is never visited. So a library's attention of one block is all it needs; fused.py does
the same with a kernel that knows positions.

Source: Liu et al., Ring Attention, arXiv:2310.01889; Dao, FlashAttention-2, arXiv:2307.08691.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from megatsp.comm import Comm
from megatsp.cp.documents import Documents, Reach, Visit, visits_of
from megatsp.cp.exchange import Arrival, Exchange
from megatsp.cp.local import BlockAttention, CausalSquares
from megatsp.tsp.partition import to_global, to_shards

_ALL = slice(None)  # heads


class BlockwiseAttention:
    """softmax(q k^T scale) v over the S ranks of `comm`: a `SequenceAttention`.

    exchange: posts the exchange of keys and values [2, B, K, T/S, d] under a traffic label.
    """

    def __init__(
        self, exchange: Callable[[Tensor, str], Exchange], comm: Comm, kernel: BlockAttention, scale: float
    ) -> None:
        self._exchange, self._comm, self._kernel, self._scale = exchange, comm, kernel, scale
        self._own = CausalSquares(kernel)
        self._of_one_document: dict[tuple[int, ...], list[Visit]] = {}

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `SequenceAttention.forward`; the log-sum-exp is [B, H, T/S] in fp32."""
        exchange, attention = (
            self._exchange(torch.stack([k, v]), "kv/forward"),
            self._kernel.attention_forward,
        )
        out, lse = self._own.causal_forward(q, k, v, self._scale, documents.own if documents else None)
        total, lse = out.float(), lse.contiguous()
        for arrival in exchange.arrivals():
            visits = self._visits(arrival, documents)
            key, value = _in_order(arrival)
            del arrival  # before the kernel runs
            for samples, rows, columns in visits:
                at, seen = (samples, _ALL, rows), (samples, _ALL, columns)
                part, part_lse = attention(q[at], key[seen], value[seen], False, self._scale)
                _merge(total[at], lse[at], part, part_lse)
            del key, value  # before the next ones arrive
        return total.to(q.dtype), lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        documents: Documents | None = None,
    ) -> tuple[Tensor, Callable[[], tuple[Tensor, Tensor]]]:  # fmt: skip
        """As `SequenceAttention.backward`; all gradients are fp32."""
        exchange, gradient = (
            self._exchange(torch.stack([k, v]), "kv/backward"),
            self._kernel.attention_backward,
        )
        dq, dk, dv = self._own.causal_backward(
            dout, q, k, v, out, lse, self._scale, documents.own if documents else None
        )
        dq, own = dq.float(), torch.stack([dk.float(), dv.float()])
        for arrival in exchange.arrivals():
            visits, shards = self._visits(arrival, documents), arrival.kv.shape[0]
            key, value = _in_order(arrival)
            del arrival
            dkv = own.new_zeros(2, *key.shape)
            for samples, rows, columns in visits:
                at, seen = (samples, _ALL, rows), (samples, _ALL, columns)
                # The block's share of the whole row's softmax: hence the row's out and lse.
                part = gradient(dout[at], q[at], key[seen], value[seen], out[at], lse[at], False, self._scale)
                dq[at] += part[0]
                dkv[0][seen], dkv[1][seen] = part[1:]
            del key, value
            exchange.send(to_shards(dkv, shards) if shards > 1 else dkv[None])

        def arrived() -> tuple[Tensor, Tensor]:
            dk, dv = exchange.total(own).unbind()
            return dk, dv

        return dq, arrived

    def _visits(self, arrival: Arrival, documents: Documents | None) -> list[Visit]:
        """What this rank's queries see of an arrival; see `visits_of`."""
        shards, _, batch, _, tokens, _ = arrival.kv.shape
        if documents is not None:
            return documents.visits(arrival.first, shards)
        key = batch, tokens, arrival.first, shards
        if key not in self._of_one_document:
            reaches = [(Reach(tokens // 2, 0), Reach(tokens // 2, 0))] * batch
            self._of_one_document[key] = visits_of(
                reaches, tokens // 2, self._comm.rank, self._comm.size, arrival.first, shards
            )
        return self._of_one_document[key]


def _in_order(arrival: Arrival) -> Tensor:
    """Keys and values [2, B, K, n T/S, d] in the order of the sequence.

    The copy costs less than a visit to every chunk where it lies.
    """
    return to_global(arrival.kv) if arrival.kv.shape[0] > 1 else arrival.kv[0]


def _merge(total: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Widens the softmax whose output and log-sum-exp are `total` and `lse`, in place, by a block.

    total e^lse + part e^part_lse over e^lse + e^part_lse: a mean, weighted by a sigmoid.
    """
    total.lerp_(part.float(), torch.sigmoid(part_lse - lse)[..., None])
    torch.logaddexp(lse, part_lse, out=lse)
