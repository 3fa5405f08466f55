"""The plain text of attention with its log-sum-exp: what op.py is tested against."""

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
