"""RMSNorm over the last dim with an explicit backward.

Source: Zhang & Sennrich, arXiv:1910.07467; the order of casts is Hugging Face Llama's.
"""

import torch
from torch import Tensor


def rms_norm(x: Tensor, gain: Tensor, epsilon: float) -> Tensor:
    """x / rms(x) * gain: [.., n] with gain [n]; normalised in fp32, returned in x's dtype."""
    return (x.float() * _inverse_rms(x, epsilon)).to(x.dtype) * gain.to(x.dtype)


def rms_norm_backward(dy: Tensor, x: Tensor, gain: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Gradients of rms_norm: dx [.., n] and dgain [n], both fp32."""
    dy, inverse = dy.float(), _inverse_rms(x, epsilon)
    unit = x.float() * inverse
    dgain = (dy * unit).flatten(0, -2).sum(0)
    dunit = dy * gain.float()
    return inverse * (dunit - unit * (dunit * unit).mean(-1, keepdim=True)), dgain


def _inverse_rms(x: Tensor, epsilon: float) -> Tensor:
    return torch.rsqrt(x.float().square().mean(-1, keepdim=True) + epsilon)
