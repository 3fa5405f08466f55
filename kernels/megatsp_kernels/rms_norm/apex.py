"""RMSNorm by apex's fused extension, where it is installed.

The functions of the extension itself: the layer has no autograd graph inside. The backward computes in
fp32, so that gradients leave unrounded. Source: apex/normalization/fused_layer_norm.py of NVIDIA/apex.
"""

import importlib
from typing import Any

import torch
from torch import Tensor

_EXTENSION = "fused_layer_norm_cuda"


def check() -> None:
    """Raises ValueError unless apex's extension with RMSNorm is installed."""
    _extension()


def _extension() -> Any:
    try:
        extension = importlib.import_module(_EXTENSION)
        assert callable(extension.rms_forward_affine) and callable(extension.rms_backward_affine)
    except (ImportError, AttributeError, AssertionError) as error:
        raise ValueError(
            f"kernels.norm=apex needs the extension {_EXTENSION} of NVIDIA's or ROCm's apex, from source "
            f"(PyPI's apex is another project); {error}"
        ) from error
    return extension


def rms_norm(x: Tensor, gain: Tensor, epsilon: float) -> Tensor:
    """As `megatsp_kernels.rms_norm.rms_norm`, but gained before it is rounded, as apex does."""
    shape = (x.shape[-1],)
    return _extension().rms_forward_affine(x.contiguous(), shape, gain.to(x.dtype).contiguous(), epsilon)[0]


def add_rms_norm(
    x: Tensor, update: Tensor, gain: Tensor, epsilon: float, inplace: bool = False
) -> tuple[Tensor, Tensor]:
    """As `megatsp_kernels.rms_norm.add_rms_norm`; the sum is torch's."""
    total = (update.add_(x) if inplace else update + x).to(x.dtype)
    return total, rms_norm(total, gain, epsilon)


def rms_norm_backward(
    dy: Tensor, x: Tensor, gain: Tensor, epsilon: float, dresidual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `megatsp_kernels.rms_norm.rms_norm_backward`."""
    extension, shape = _extension(), (x.shape[-1],)
    dy, x, gain = (t.to(torch.float32).contiguous() for t in (dy, x, gain))
    _, inverse = extension.rms_forward_affine(x, shape, gain, epsilon)
    dx, dgain = extension.rms_backward_affine(dy, inverse, x, shape, gain, epsilon, False)
    return dx if dresidual is None else dx.add_(dresidual), dgain
