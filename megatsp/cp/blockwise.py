"""Causal attention of local queries over the whole sequence, one block of keys after another.

Queries, keys and values are sharded over the sequence in zigzag chunks. Keys and values
cross the group unexpanded, in one of several exchanges; partial outputs merge by their
log-sum-exp, in fp32. A rank's own tokens are one causal block, attended to while
the others' are on the wire; every other block is seen wholly or not at all, and those not
seen are never visited.

Source: Liu et al., Ring Attention, arXiv:2310.01889; Dao, FlashAttention-2, arXiv:2307.08691.
"""

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from megatsp_kernels.attention import attention_backward, attention_forward
from torch import Tensor

# Local queries [rows] see the arrived keys [columns] wholly.
Visit = tuple[slice, slice]


class Exchange(Protocol):
    """Brings the others' keys and values, and takes the gradients of them home.

    Made with this rank's keys and values, when its first transfer is posted; then `arrivals`; in
    the backward `send` after each; then `total`.
    """

    def arrivals(self) -> Iterator[tuple[Tensor, list[Visit]]]:
        """Yields keys and values [2, B, K, tokens, d], and which queries see which (disjoint) columns.

        What comes next is posted before. Keeps nothing of what was yielded: nor should the caller.
        """

    def send(self, gradient: Tensor) -> None:
        """Takes the fp32 gradient of what was yielded last; it is overwritten."""

    def total(self, own: Tensor) -> Tensor:
        """`own` plus what all ranks sent for this rank's keys and values: fp32 [2, B, K, T/S, d]."""


class BlockwiseAttention:
    """softmax(q k^T scale) v over a group of S ranks: a `SequenceAttention`.

    exchange: posts the exchange of keys and values [2, B, K, T/S, d] under a traffic label.
    """

    def __init__(self, exchange: Callable[[Tensor, str], Exchange], scale: float) -> None:
        self._exchange, self._scale = exchange, scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """As `SequenceAttention.forward`; the log-sum-exp is [B, H, T/S] in fp32."""
        exchange = self._exchange(torch.stack([k, v]), "kv/forward")
        out, lse = attention_forward(q, k, v, True, self._scale)
        total, lse = out.float(), lse.contiguous()
        for (key, value), visits in exchange.arrivals():
            for rows, columns in visits:
                part, part_lse = attention_forward(
                    q[..., rows, :], key[..., columns, :], value[..., columns, :], False, self._scale
                )
                _merge(total[..., rows, :], lse[..., rows], part, part_lse)
            del key, value  # before the next ones arrive
        return total.to(q.dtype), lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Callable[[], tuple[Tensor, Tensor]]]:
        """As `SequenceAttention.backward`; all gradients are fp32."""
        exchange = self._exchange(torch.stack([k, v]), "kv/backward")
        dq, dk, dv = attention_backward(dout, q, k, v, out, lse, True, self._scale)
        dq, own = dq.float(), torch.stack([dk.float(), dv.float()])
        for (key, value), visits in exchange.arrivals():
            dkv = own.new_zeros(2, *key.shape)
            for rows, columns in visits:
                # The block's share of the whole row's softmax: hence the row's out and lse.
                part = attention_backward(
                    dout[..., rows, :], q[..., rows, :], key[..., columns, :], value[..., columns, :],
                    out[..., rows, :], lse[..., rows], False, self._scale,
                )  # fmt: skip
                dq[..., rows, :] += part[0]
                dkv[0][..., columns, :], dkv[1][..., columns, :] = part[1:]
            del key, value
            exchange.send(dkv)

        def arrived() -> tuple[Tensor, Tensor]:
            dk, dv = exchange.total(own).unbind()
            return dk, dv

        return dq, arrived


def _merge(total: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Widens the softmax whose output and log-sum-exp are `total` and `lse`, in place, by a block.

    total e^lse + part e^part_lse over e^lse + e^part_lse: a mean, weighted by a sigmoid.
    """
    total.lerp_(part.float(), torch.sigmoid(part_lse - lse)[..., None])
    torch.logaddexp(lse, part_lse, out=lse)
