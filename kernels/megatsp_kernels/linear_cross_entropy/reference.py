"""The plain text of linear cross-entropy: what op.py is tested against."""

from torch import Tensor
from torch.nn.functional import cross_entropy


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100, z_loss: float = 0.0
) -> Tensor:
    """lse - target's logit + z_loss lse^2, 0 where ignored. x [n, h], weight [V, h], targets [n] -> [n]."""
    logits = x @ weight.t()
    if logits.dtype.itemsize < 4:
        logits = logits.float()
    penalty = z_loss * logits.logsumexp(-1).square()
    losses = cross_entropy(logits, targets, ignore_index=ignore_index, reduction="none")
    return losses + penalty.masked_fill(targets == ignore_index, 0.0)
