"""All-to-all from shards of the sequence to shards of the heads, whole attention, and back.

Per bucket a rank receives (S-1)/S of (2H + 2K) d B T/S elements in the forward and of
(4H + 4K) d B T/S in the backward, in the compute dtype: nothing is summed on the way. So with
S growing it moves ever less, where the other exchanges move the whole keys and values; but S must
divide the heads, K and V's too, as they travel unexpanded.

Source: Jacobs et al., DeepSpeed-Ulysses, arXiv:2309.14509.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from megatsp.comm import Comm, Pending
from megatsp.cp.documents import Documents
from megatsp.cp.local import CausalAttention
from megatsp.tsp.partition import to_global, to_shards


class UlyssesAttention:
    """softmax(q k^T scale) v over the S ranks of `comm`: a `SequenceAttention`. S divides H and K."""

    def __init__(self, comm: Comm, kernel: CausalAttention, scale: float) -> None:
        self._comm, self._kernel, self._scale = comm, kernel, scale

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `SequenceAttention.forward`; the log-sum-exp is [B, H/S, T], of rank r's H/S heads."""
        q, k, v = self._to_heads("ulysses/forward", q, k, v)
        out, lse = self._kernel.causal_forward(q, k, v, self._scale, documents.whole if documents else None)
        return self._to_sequence("ulysses/forward", out).wait(), lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        documents: Documents | None = None,
    ) -> tuple[Tensor, Callable[[], tuple[Tensor, Tensor]]]:  # fmt: skip
        """As `SequenceAttention.backward`; all gradients are fp32, but travelled in the compute dtype."""
        dout, q, k, v, out = self._to_heads("ulysses/backward", dout, q, k, v, out)
        dq, dk, dv = self._kernel.causal_backward(
            dout, q, k, v, out, lse, self._scale, documents.whole if documents else None
        )
        dq_pending = self._to_sequence("ulysses/backward", dq)
        dkv_pending = self._to_sequence("ulysses/backward", torch.stack([dk, dv]))

        def arrived() -> tuple[Tensor, Tensor]:
            dk, dv = dkv_pending.wait().float().unbind()
            return dk, dv

        return dq_pending.wait().float(), arrived

    def _to_heads(self, label: str, *tensors: Tensor) -> list[Tensor]:
        """Several [B, heads, T/S, d] by one all-to-all to [B, heads/S, T, d], tokens in order."""
        size = self._comm.size
        assert all(t.shape[1] % size == 0 for t in tensors)
        # Part r, for rank r: its heads of every tensor. Rank r's query heads see its K/V heads alone.
        parts = torch.cat([t.unflatten(1, (size, -1)).movedim(1, 0) for t in tensors], dim=2)
        whole = to_global(self._comm.all_to_all(parts, label).wait())
        return list(whole.split([t.shape[1] // size for t in tensors], dim=1))

    def _to_sequence(self, label: str, heads: Tensor) -> Pending:
        """[.., B, heads/S, T, d] to [.., B, heads, T/S, d]: rank r receives its tokens of all heads."""
        arriving = self._comm.all_to_all(to_shards(heads, self._comm.size), label)
        return arriving.then(lambda parts: parts.movedim(0, -4).flatten(-4, -3))
