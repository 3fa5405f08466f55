"""The plain text of RMSNorm: what op.py is tested against."""

from torch import Tensor


def rms_norm(x: Tensor, gain: Tensor, epsilon: float) -> Tensor:
    """x / rms(x) * gain: normalised in fp32 (fp64: in fp64), rounded to x's dtype, then times the gain."""
    wide = x if x.element_size() > 4 else x.float()
    inverse = (wide.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    return (wide * inverse).to(x.dtype) * gain.to(x.dtype)


def add_rms_norm(x: Tensor, update: Tensor, gain: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """x + update in x's dtype, and its RMSNorm."""
    total = (x + update).to(x.dtype)
    return total, rms_norm(total, gain, epsilon)


def rms_norm_backward(dy: Tensor, x: Tensor, gain: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """dx and dgain with nothing rounded: all in fp32 (fp64 of fp64)."""
    dy, x, gain = (t if t.element_size() > 4 else t.float() for t in (dy, x, gain))
    inverse = (x.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    projection = (dy * gain * x).mean(-1, keepdim=True) * inverse**3
    return dy * gain * inverse - x * projection, (dy * x * inverse).reshape(-1, x.shape[-1]).sum(0)
