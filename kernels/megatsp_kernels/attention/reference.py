"""The plain text of attention with its log-sum-exp: what op.py and sdpa.py are tested against."""

import torch
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """softmax(q k^T scale) v and the log-sum-exp of its scores, in fp32 and with a whole score matrix.

    q: [B, H, Tq, d]; k, v: [B, K, Tk, d], K dividing H. Returns [B, H, Tq, d] and [B, H, Tq].
    A causal query i sees the keys 0..i.
    """
    groups = q.shape[1] // k.shape[1]
    k, v = (t.float().repeat_interleave(groups, dim=1) for t in (k, v))
    scores = (q.float() @ k.mT) * scale
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp() @ v, lse


def positions(starts: Tensor, tokens: int) -> Tensor:
    """[tokens] that are equal chunks, each from its start on; -1: absent."""
    in_chunk = torch.arange(tokens // starts.numel(), device=starts.device)
    return torch.where(starts[:, None] < 0, -1, starts[:, None] + in_chunk).flatten()


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_starts: Tensor,
    k_starts: Tensor,
    scale: float,
    q_first: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T scale) v over the visible keys, and the log-sum-exp, in the dtype of the inputs.

    Shapes as in op.py. A query that sees nothing: 0 and -inf.
    """
    k, v = (t.movedim(0, 2).flatten(2, 3).repeat_interleave(q.shape[1] // t.shape[2], dim=1) for t in (k, v))
    of_query, of_key = positions(q_starts, q.shape[2])[:, None], positions(k_starts, k.shape[2])
    first = 0 if q_first is None else q_first[:, None, :, None]
    seen = (of_key >= first) & (of_key <= of_query)
    scores = ((q @ k.mT) * scale).masked_fill(~seen, float("-inf"))
    lse = scores.logsumexp(-1)
    shift = lse.detach().masked_fill(lse == float("-inf"), 0.0)  # no gradient: weights are normalised again
    weights = (scores - shift[..., None]).exp()
    return (weights / weights.sum(-1, keepdim=True).clamp(min=0.5)) @ v, lse
