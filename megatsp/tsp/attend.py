"""Causal attention of local queries over the whole sequence.

Queries, keys and values are sharded over the sequence in zigzag chunks. Keys and values
cross the group unexpanded, by one all-gather or around a ring; partial outputs merge by
their log-sum-exp, in fp32. A rank's own tokens are one causal block, attended to while
the others' are on the wire; every other block is seen wholly or not at all, and those not
seen are never visited.

Source: Liu et al., Ring Attention, arXiv:2310.01889; Dao, FlashAttention-2, arXiv:2307.08691.
"""

from collections.abc import Callable, Iterator

import torch
from megatsp_kernels.attention import attention_backward, attention_forward
from torch import Tensor

from megatsp.comm import Comm, Pending, TravellingSum
from megatsp.tsp.partition import to_global, to_shards

# Local queries [rows] see the arrived keys [columns] wholly.
Visit = tuple[slice, slice]


class AllGatherExchange:
    """One all-gather of keys and values; gradients return by one reduce-scatter.

    Both exchanges are used alike: made (the first transfer is posted) with this rank's keys and
    values [2, B, K, T/D, d]; then `arrivals`; in the backward `send` after each; then `total`.
    """

    def __init__(self, comm: Comm, kv: Tensor, label: str) -> None:
        self._comm = comm
        self._kv = comm.all_gather(kv[None], label)
        self._gradient: Pending | None = None

    def arrivals(self) -> Iterator[tuple[Tensor, list[Visit]]]:
        """Yields arrived keys and values [2, B, K, tokens, d] with the queries that see them."""
        # In sequence order rank p's queries see chunks 0..p-1, and the later half of them,
        # chunk 2D-1-p, also chunks p+1..2D-2-p; chunk p and itself were its own block.
        rank, size = self._comm.rank, self._comm.size
        kv = to_global(self._kv.wait())
        chunk = kv.shape[-2] // (2 * size)
        earlier = (slice(None), slice(0, rank * chunk))
        between = (slice(chunk, None), slice((rank + 1) * chunk, (2 * size - 1 - rank) * chunk))
        yield kv, [visit for visit in (earlier, between) if visit[1].start < visit[1].stop]

    def send(self, gradient: Tensor) -> None:
        """Takes the fp32 gradient of what was yielded last."""
        self._gradient = self._comm.reduce_scatter(to_shards(gradient, self._comm.size), "kv/gradients")

    def total(self, own: Tensor) -> Tensor:
        """`own` plus what all ranks sent for this rank's keys and values: fp32 [2, B, K, T/D, d]."""
        assert self._gradient is not None
        return own.add_(self._gradient.wait()[0])


class RingExchange:
    """D-1 hops to the next rank; gradients travel along behind (`TravellingSum`)."""

    def __init__(self, comm: Comm, kv: Tensor, label: str) -> None:
        self._comm, self._label, self._step = comm, label, 0
        self._kv = comm.shift(kv, torch.empty_like(kv), label)
        self._sum = TravellingSum(comm, "kv/gradients")

    def arrivals(self) -> Iterator[tuple[Tensor, list[Visit]]]:
        # From an earlier rank its earlier half is seen by all queries, its later half by none;
        # from a later rank both halves are seen by the later half of the queries.
        rank, size = self._comm.rank, self._comm.size
        for self._step in range(1, size):
            kv = self._kv.wait()
            if self._step < size - 1:
                self._kv = self._comm.shift(kv, torch.empty_like(kv), self._label)
            half = kv.shape[-2] // 2
            from_earlier = (rank - self._step) % size < rank
            yield kv, [(slice(None), slice(0, half)) if from_earlier else (slice(half, None), slice(None))]

    def send(self, gradient: Tensor) -> None:
        self._sum.add(self._step, gradient, gradient.shape)

    def total(self, own: Tensor) -> Tensor:
        self._sum.add(0, own, own.shape)
        return self._sum.total()


EXCHANGES: dict[str, type[AllGatherExchange] | type[RingExchange]] = {
    "allgather": AllGatherExchange,
    "ring": RingExchange,
}


class SequenceAttention:
    """softmax(q k^T scale) v on one group, causal by global position.

    Shapes: q [B, H, T/D, d]; k, v [B, K, T/D, d], K dividing H. exchange: a key of EXCHANGES.
    """

    def __init__(self, comm: Comm, exchange: str, scale: float) -> None:
        self._comm, self._exchange, self._scale = comm, EXCHANGES[exchange], scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Returns out [B, H, T/D, d] in q's dtype and the log-sum-exp [B, H, T/D] in fp32."""
        if self._comm.size == 1:
            return attention_forward(q, k, v, True, self._scale)
        exchange = self._exchange(self._comm, torch.stack([k, v]), "kv/forward")
        out, lse = attention_forward(q, k, v, True, self._scale)
        total, lse = out.float(), lse.contiguous()
        for (key, value), visits in exchange.arrivals():
            for rows, columns in visits:
                part, part_lse = attention_forward(
                    q[..., rows, :], key[..., columns, :], value[..., columns, :], False, self._scale
                )
                merged = torch.logaddexp(lse[..., rows], part_lse)
                total[..., rows, :] *= (lse[..., rows] - merged).exp()[..., None]
                total[..., rows, :] += part * (part_lse - merged).exp()[..., None]
                lse[..., rows] = merged
        return total.to(q.dtype), lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Callable[[], tuple[Tensor, Tensor]]]:
        """Gradients of forward, given its results: dq, and a call that waits for dk and dv; fp32.

        Between the two the gradients of keys and values travel: there is time to compute.
        """
        if self._comm.size == 1:
            dq, dk, dv = attention_backward(dout, q, k, v, out, lse, True, self._scale)
            return dq.float(), lambda: (dk.float(), dv.float())
        exchange = self._exchange(self._comm, torch.stack([k, v]), "kv/backward")
        dq, dk, dv = attention_backward(dout, q, k, v, out, lse, True, self._scale)
        dq, own = dq.float(), torch.stack([dk, dv]).float()
        for (key, value), visits in exchange.arrivals():
            dkv = own.new_zeros(2, *key.shape)
            for rows, columns in visits:
                # The block's share of the whole row's softmax: hence the row's out and lse.
                part = attention_backward(
                    dout[..., rows, :], q[..., rows, :], key[..., columns, :], value[..., columns, :],
                    out[..., rows, :], lse[..., rows], False, self._scale,
                )  # fmt: skip
                dq[..., rows, :] += part[0]
                dkv[0][..., columns, :] += part[1]
                dkv[1][..., columns, :] += part[2]
            exchange.send(dkv)

        def arrived() -> tuple[Tensor, Tensor]:
            dk, dv = exchange.total(own).unbind()
            return dk, dv

        return dq, arrived
