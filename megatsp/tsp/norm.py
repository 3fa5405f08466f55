"""RMSNorm over the last dim with an explicit backward.

Source: Zhang & Sennrich, arXiv:1910.07467; the order of casts is Hugging Face Llama's.
"""

import torch
from torch import Tensor


def rms_norm(x: Tensor, gain: Tensor, epsilon: float) -> Tensor:
    """x / rms(x) * gain: [.., n] with gain [n]; normalised in fp32, returned in x's dtype."""
    return (x * _inverse_rms(x, epsilon)).to(x.dtype).mul_(gain.to(x.dtype))


def add_rms_norm(
    x: Tensor, update: Tensor, gain: Tensor, epsilon: float, inplace: bool = False
) -> tuple[Tensor, Tensor]:
    """x + update, rounded to x's dtype, and rms_norm of it. update: [.., n] in x's dtype or fp32.

    inplace: the sum may take the memory of `update`.
    """
    total = (update.add_(x) if inplace else update + x).to(x.dtype)
    return total, rms_norm(total, gain, epsilon)


def rms_norm_backward(
    dy: Tensor, x: Tensor, gain: Tensor, epsilon: float, dresidual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of rms_norm: dx [.., n] (plus `dresidual`, if given) and dgain [n], both fp32."""
    # With r = 1 / rms(x): dx = r dy gain - x r^3 <dy gain, x> / n, and dgain = sum of r dy x.
    dy, x, gain, inverse = dy.float(), x.float(), gain.float(), _inverse_rms(x, epsilon)
    products = (dy * x).flatten(0, -2)
    dgain = inverse.flatten() @ products
    projection = (products @ gain).view_as(inverse).mul_(inverse**3 / x.shape[-1])
    del products
    dx = (dy * gain).mul_(inverse).addcmul_(x, projection, value=-1)
    return dx if dresidual is None else dx.add_(dresidual), dgain


def _inverse_rms(x: Tensor, epsilon: float) -> Tensor:
    """fp32 [.., 1]."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
