"""The attention op equals the plain text: output, log-sum-exp and gradients, at odd lengths."""

import pytest
import torch
from megatsp_kernels.attention import sdpa
from megatsp_kernels.attention.reference import attention
from megatsp_kernels.attention.sdpa import attention_backward, attention_forward
from torch import Tensor

SCALE = 0.25
# query heads, key/value heads, queries, keys, head width, causal
SHAPES = [
    (4, 4, 13, 13, 8, True),
    (4, 4, 13, 7, 8, False),
    (6, 2, 33, 65, 12, False),
    (6, 2, 65, 65, 16, True),
    (5, 1, 1, 9, 6, False),
    (5, 1, 1, 1, 6, True),
]


def inputs(shape: tuple) -> tuple[Tensor, ...]:
    """q, k, v and the gradient of the output."""
    query_heads, kv_heads, queries, keys, d, _ = shape
    generator = torch.Generator().manual_seed(queries + keys)
    sizes = [(query_heads, queries), (kv_heads, keys), (kv_heads, keys), (query_heads, queries)]
    return tuple(torch.randn(2, heads, tokens, d, generator=generator) for heads, tokens in sizes)


@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_gradients_equal_the_reference(shape):
    q, k, v, dout = inputs(shape)
    out, lse = attention_forward(q, k, v, shape[-1], SCALE)
    gradients = attention_backward(dout, q, k, v, out, lse, shape[-1], SCALE)
    for t in (q, k, v):
        t.requires_grad_()
    expected, expected_lse = attention(q, k, v, shape[-1], SCALE)
    torch.testing.assert_close(out, expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, expected_lse.detach(), rtol=1e-6, atol=1e-6)
    assert lse.dtype == torch.float32
    for ours, autograd in zip(gradients, torch.autograd.grad(expected, (q, k, v), dout), strict=True):
        torch.testing.assert_close(ours, autograd, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_error_is_at_most_twice_that_of_rounding_the_exact_result(shape):
    """And the log-sum-exp, which stays fp32, is far nearer than bf16 could say it."""
    q, k, v, _ = (t.bfloat16() for t in inputs(shape))
    out, lse = attention_forward(q, k, v, shape[-1], SCALE)
    expected, expected_lse = attention(q, k, v, shape[-1], SCALE)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    rounding, lse_rounding = ((t.bfloat16().float() - t).norm() for t in (expected, expected_lse))
    assert (out.float() - expected).norm() <= 2 * rounding
    assert (lse - expected_lse).norm() <= 0.05 * lse_rounding


def test_blocks_merge_by_their_log_sum_exp():
    q, k, v, dout = inputs((4, 2, 11, 11, 8, False))
    whole, whole_lse = attention_forward(q, k, v, False, SCALE)
    blocks = [slice(0, 4), slice(4, None)]
    parts = [attention_forward(q, k[:, :, s], v[:, :, s], False, SCALE) for s in blocks]
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    merged = sum(out * (part_lse - lse).exp()[..., None] for out, part_lse in parts)
    torch.testing.assert_close(merged, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, whole_lse, rtol=1e-6, atol=1e-6)
    # Backward: every block is given the whole row's output and log-sum-exp.
    dq, dk, dv = attention_backward(dout, q, k, v, whole, whole_lse, False, SCALE)
    by_block = [
        attention_backward(dout, q, k[:, :, s], v[:, :, s], merged, lse, False, SCALE) for s in blocks
    ]
    torch.testing.assert_close(sum(part[0] for part in by_block), dq, rtol=1e-5, atol=2e-6)
    for i, expected in ((1, dk), (2, dv)):
        torch.testing.assert_close(torch.cat([p[i] for p in by_block], 2), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("q", "k", "v"),
    [
        ((2, 4, 5), (2, 4, 5, 8), (2, 4, 5, 8)),
        ((2, 4, 5, 8), (2, 4, 5, 8), (2, 4, 6, 8)),
        ((2, 4, 5, 8), (2, 3, 5, 8), (2, 3, 5, 8)),
        ((2, 4, 5, 8), (2, 4, 5, 6), (2, 4, 5, 6)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(q, k, v):
    tensors = [torch.zeros(shape) for shape in (q, k, v)]
    with pytest.raises(ValueError, match=r"attention takes q \[B, H, Tq, d\]") as error:
        attention_forward(*tensors, False, SCALE)
    assert str(q) in str(error.value) and str(v) in str(error.value)
    with pytest.raises(ValueError, match="attention takes q"):
        attention_backward(tensors[0], *tensors, tensors[0], tensors[0], False, SCALE)


def test_causal_needs_as_many_queries_as_keys():
    q, k = torch.zeros(1, 2, 5, 8), torch.zeros(1, 2, 6, 8)
    with pytest.raises(ValueError, match="causal attention needs as many queries as keys; got 5 and 6"):
        attention_forward(q, k, k, True, SCALE)


def test_a_strided_log_sum_exp_reaches_the_kernel_contiguous(monkeypatch):
    """A GPU's kernel reads it by pointer and does not look at strides."""
    q, k, v, dout = inputs((4, 4, 13, 13, 8, True))
    out, lse = attention_forward(q, k, v, False, SCALE)
    seen = []
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

    class Spy:
        @staticmethod
        def _scaled_dot_product_flash_attention_for_cpu_backward(*arguments, **options):
            seen.append(arguments[5])
            return kernel(*arguments, **options)

    monkeypatch.setattr(sdpa, "_aten", Spy)
    later = slice(6, None)
    strided = lse.contiguous()[..., later]
    assert not strided.is_contiguous()
    attention_backward(dout[:, :, later], q[:, :, later], k, v, out[:, :, later], strided, False, SCALE)
    assert [t.is_contiguous() for t in seen] == [True]
