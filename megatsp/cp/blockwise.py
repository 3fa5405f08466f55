"""Causal attention of local queries over the whole sequence, one block of keys after another.

Queries, keys and values are sharded over the sequence in zigzag chunks. Keys and values
cross the group unexpanded, in one of several exchanges; partial outputs merge by their
log-sum-exp, in fp32. A rank's own tokens are one causal block, attended to while
the others' are on the wire; every other block is seen wholly or not at all, and those not
seen are never visited. So a library's attention of one block is all it needs; fused.py does the
same with a kernel that knows positions.

Source: Liu et al., Ring Attention, arXiv:2310.01889; Dao, FlashAttention-2, arXiv:2307.08691.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from megatsp.comm import Comm
from megatsp.cp.exchange import Arrival, Exchange
from megatsp.cp.local import BlockAttention
from megatsp.tsp.partition import to_global, to_shards

# Local queries [rows] see the arrived keys [columns] wholly.
Visit = tuple[slice, slice]


class BlockwiseAttention:
    """softmax(q k^T scale) v over the S ranks of `comm`: a `SequenceAttention`.

    exchange: posts the exchange of keys and values [2, B, K, T/S, d] under a traffic label.
    """

    def __init__(
        self, exchange: Callable[[Tensor, str], Exchange], comm: Comm, kernel: BlockAttention, scale: float
    ) -> None:
        self._exchange, self._comm, self._kernel, self._scale = exchange, comm, kernel, scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """As `SequenceAttention.forward`; the log-sum-exp is [B, H, T/S] in fp32."""
        exchange, attention = (
            self._exchange(torch.stack([k, v]), "kv/forward"),
            self._kernel.attention_forward,
        )
        out, lse = attention(q, k, v, True, self._scale)
        total, lse = out.float(), lse.contiguous()
        for arrival in exchange.arrivals():
            visits = visits_of(arrival, self._comm)
            key, value = _in_order(arrival)
            del arrival  # before the kernel runs
            for rows, columns in visits:
                part, part_lse = attention(
                    q[..., rows, :], key[..., columns, :], value[..., columns, :], False, self._scale
                )
                _merge(total[..., rows, :], lse[..., rows], part, part_lse)
            del key, value  # before the next ones arrive
        return total.to(q.dtype), lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Callable[[], tuple[Tensor, Tensor]]]:
        """As `SequenceAttention.backward`; all gradients are fp32."""
        exchange, gradient = (
            self._exchange(torch.stack([k, v]), "kv/backward"),
            self._kernel.attention_backward,
        )
        dq, dk, dv = gradient(dout, q, k, v, out, lse, True, self._scale)
        dq, own = dq.float(), torch.stack([dk.float(), dv.float()])
        for arrival in exchange.arrivals():
            visits, shards = visits_of(arrival, self._comm), arrival.kv.shape[0]
            key, value = _in_order(arrival)
            del arrival
            dkv = own.new_zeros(2, *key.shape)
            for rows, columns in visits:
                # The block's share of the whole row's softmax: hence the row's out and lse.
                part = gradient(
                    dout[..., rows, :], q[..., rows, :], key[..., columns, :], value[..., columns, :],
                    out[..., rows, :], lse[..., rows], False, self._scale,
                )  # fmt: skip
                dq[..., rows, :] += part[0]
                dkv[0][..., columns, :], dkv[1][..., columns, :] = part[1:]
            del key, value
            exchange.send(to_shards(dkv, shards) if shards > 1 else dkv[None])

        def arrived() -> tuple[Tensor, Tensor]:
            dk, dv = exchange.total(own).unbind()
            return dk, dv

        return dq, arrived


def visits_of(arrival: Arrival, comm: Comm) -> list[Visit]:
    """Which of this rank's queries see which (disjoint) columns of the arrival in sequence order."""
    shards, tokens = arrival.kv.shape[0], arrival.kv.shape[-2]
    own, chunk, keys = comm.rank - arrival.first, tokens // 2, shards * tokens
    if own < 0:  # later ranks' tokens lie between our chunks: our high chunk sees all of them
        return [(slice(chunk, None), slice(None))]
    if own >= shards:  # earlier ranks' lie on either side of ours: both chunks see the low half
        return [(slice(None), slice(0, keys // 2))]
    # Among them is our own block, which was attended to: before it lie the earlier ranks' low chunks,
    # and between its two chunks the later ranks' chunks, which our high chunk sees.
    earlier = (slice(None), slice(0, own * chunk))
    between = (slice(chunk, None), slice((own + 1) * chunk, (2 * shards - 1 - own) * chunk))
    return [visit for visit in (earlier, between) if visit[1].start < visit[1].stop]


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
