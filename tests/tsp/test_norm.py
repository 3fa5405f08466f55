"""RMSNorm's explicit backward equals autograd's."""

import pytest
import torch
from torch import Tensor

from megatsp.tsp.norm import rms_norm, rms_norm_backward

EPSILON = 1e-3  # large enough to be missed if it were left out


def exact(x: Tensor, gain: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPSILON) * gain


@pytest.fixture
def tensors() -> tuple[Tensor, Tensor, Tensor]:
    """x, gain and dy, fp64; the rows of x have very different sizes, and one is zero."""
    generator = torch.Generator().manual_seed(3)
    x, dy = torch.randn(2, 2, 5, 7, generator=generator, dtype=torch.float64)
    x *= torch.tensor([0.0, 1e-2, 1.0, 10.0, 100.0], dtype=torch.float64)[:, None]
    return x, torch.randn(7, generator=generator, dtype=torch.float64), dy


def test_forward(tensors):
    x, gain, _ = tensors
    torch.testing.assert_close(rms_norm(x.float(), gain.float(), EPSILON).double(), exact(x, gain),
                               rtol=1e-6, atol=1e-6)  # fmt: skip
    assert rms_norm(x.bfloat16(), gain, EPSILON).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_backward_equals_autograd(tensors, dtype):
    """Autograd in fp64 or fp32; ours computes in fp32 either way."""
    x, gain, dy = (t.to(dtype) for t in tensors)
    x.requires_grad_(), gain.requires_grad_()
    exact(x, gain).backward(dy)
    dx, dgain = rms_norm_backward(dy.float(), x.detach().float(), gain.detach().float(), EPSILON)
    assert (dx.dtype, dgain.dtype) == (torch.float32, torch.float32)
    for ours, autograd in ((dx, x.grad), (dgain, gain.grad)):
        torch.testing.assert_close(ours, autograd.float(), rtol=2e-5, atol=2e-6)


def test_backward_of_bf16_is_computed_in_fp32(tensors):
    x, gain, dy = (t.bfloat16() for t in tensors)
    for ours, exactly in zip(
        rms_norm_backward(dy, x, gain, EPSILON),
        rms_norm_backward(dy.float(), x.float(), gain.float(), EPSILON),
        strict=True,
    ):
        assert torch.equal(ours, exactly)
