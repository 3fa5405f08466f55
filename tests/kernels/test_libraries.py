"""Libraries chosen by name: the calls they get, on stand-ins with their functions' own parameters.

None of them is built for a CPU; on a GPU the real ones are compared, where they are installed.
"""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from megatsp_kernels.attention import aiter, flash_attn, sdpa
from megatsp_kernels.rms_norm import apex
from torch import Tensor

from megatsp.tsp import norm

SCALE = 0.3


def flash_forward(
    q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
    return_softmax,
):  # fmt: skip
    assert (dropout_p, window_size_left, window_size_right, softcap, alibi_slopes) == (0.0, -1, -1, 0.0, None)
    out, lse = sdpa.attention_forward(*(t.transpose(1, 2) for t in (q, k, v)), causal, softmax_scale)
    return out.transpose(1, 2), lse, None, None


def flash_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left,
    window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
):  # fmt: skip
    assert deterministic and (window_size_left, window_size_right, softcap) == (-1, -1, 0.0)
    tensors = (t.transpose(1, 2) for t in (dout, q, k, v, out))
    found = sdpa.attention_backward(*tensors, softmax_lse, causal, softmax_scale)
    for target, gradient in zip((dq, dk, dv), found, strict=True):
        assert target.is_contiguous()
        target.copy_(gradient.transpose(1, 2))


def aiter_forward(
    q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, bias, alibi_slopes,
    return_lse, return_softmax,
):  # fmt: skip
    assert return_lse and bias is None and not return_softmax
    return flash_forward(q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, 0.0,
                         alibi_slopes, False)  # fmt: skip


def aiter_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, dbias, dropout_p, softmax_scale, causal, window_size_left,
    window_size_right, bias, alibi_slopes, deterministic, rng_state=None, is_v3_atomic_fp32=True,
    how_v3_bf16_cvt=1,
):  # fmt: skip
    assert dbias is None and bias is None
    flash_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal,
                   window_size_left, window_size_right, 0.0, alibi_slopes, deterministic)  # fmt: skip


def module(name: str, **members: Any) -> ModuleType:
    found = ModuleType(name)
    found.__dict__.update(members)
    return found


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for all three libraries."""
    flash = dict(_flash_attn_forward=flash_forward, _flash_attn_backward=flash_backward)
    interface = module("flash_attn.flash_attn_interface", **flash)
    mha = module("aiter.ops.mha", _flash_attn_forward=aiter_forward, _flash_attn_backward=aiter_backward)
    extension = module(
        "fused_layer_norm_cuda", rms_forward_affine=rms_forward, rms_backward_affine=rms_backward
    )
    packages = [module("flash_attn", __version__="2.8.3"), module("aiter"), module("aiter.ops")]
    for stand_in in (*packages, interface, mha, extension):
        monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)


def rms_forward(x: Tensor, shape: tuple[int], gain: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    assert x.is_contiguous() and gain.dtype == x.dtype and shape == gain.shape
    inverse = norm._inverse_rms(x, epsilon)
    return (x.float() * inverse * gain.float()).to(x.dtype), inverse.flatten()


def rms_backward(dy, inverse, x, shape, gain, epsilon, memory_efficient):
    assert not memory_efficient and dy.is_contiguous() and {t.dtype for t in (dy, x, gain)} == {torch.float32}
    torch.testing.assert_close(inverse, norm._inverse_rms(x, epsilon).flatten())
    return norm.rms_norm_backward(dy, x, gain, epsilon)


def inputs() -> tuple[Tensor, ...]:
    """q, k, v, dout as the layer has them: [B, T, heads, d] in memory."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, 7, heads, 8, generator=generator).transpose(1, 2) for heads in (4, 2, 2, 4))


@pytest.mark.parametrize("library", [flash_attn, aiter])
@pytest.mark.parametrize("causal", [True, False])
def test_attention_is_called_as_the_library_has_it(installed, library, causal):
    library.check()
    q, k, v, dout = inputs()
    out, lse = library.attention_forward(q, k, v, causal, SCALE)
    gradients = library.attention_backward(dout, q, k, v, out, lse, causal, SCALE)
    expected = sdpa.attention_forward(q, k, v, causal, SCALE)
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])
    exact = sdpa.attention_backward(dout, q, k, v, *expected, causal, SCALE)
    assert all(map(torch.equal, gradients, exact))


def test_norm_is_called_as_apex_has_it(installed):
    apex.check()
    x, update, dy, dresidual = torch.randn(4, 2, 5, 8, generator=torch.Generator().manual_seed(1))
    gain, epsilon = torch.linspace(0.5, 2, 8), 1e-3
    strided = x.transpose(0, 1)
    torch.testing.assert_close(apex.rms_norm(strided, gain, epsilon), norm.rms_norm(strided, gain, epsilon))
    for ours, theirs in zip(
        apex.add_rms_norm(x, update, gain, epsilon), norm.add_rms_norm(x, update, gain, epsilon), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    found = apex.rms_norm_backward(dy.bfloat16(), x, gain, epsilon, dresidual)
    expected = norm.rms_norm_backward(dy.bfloat16(), x, gain, epsilon, dresidual)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("library", "message"),
    [
        (flash_attn, "kernels.attention=flash_attn needs flash-attn 2.7 or 2.8"),
        (aiter, "kernels.attention=aiter needs AMD's AITER"),
        (apex, "kernels.norm=apex needs the extension fused_layer_norm_cuda"),
    ],
)
def test_a_library_that_is_missing_is_named(library, message):
    with pytest.raises(ValueError, match=message):
        library.check()


def test_another_version_of_flash_attn_is_refused(installed, monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(__version__="3.0.0"))
    with pytest.raises(ValueError, match="found 3.0.0"):
        flash_attn.check()
