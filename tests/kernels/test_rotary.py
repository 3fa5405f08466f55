"""Rotary position embedding equals the plain text and megatsp's, of views, into views and in place."""

import pytest
import torch
from checks import DEVICE, DTYPES, Poisoned, assert_near, randn
from megatsp_kernels.rotary import rotate
from megatsp_kernels.rotary.op import _rotate, _rotate_into
from megatsp_kernels.rotary.reference import rotate as reference
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megatsp.model import rotary

# [B, H, T, d]: tails in tokens, heads and pairs; a head of one pair, and one wider than a tile.
SHAPES = [(1, 1, 1, 2), (2, 3, 5, 10), (1, 2, 9, 16), (2, 1, 3, 70), (0, 2, 3, 4), (1, 2, 0, 4)]


def angles(
    tokens: int, width: int, memory: Poisoned | None = None, samples: int | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines, fp32 [T, d/2], or [B, 1, T, d/2] of so many samples."""
    angle = randn(*([] if samples is None else [samples, 1]), tokens, width // 2, seed=9) * 3
    return tuple((memory or Poisoned()).of(t) for t in (angle.cos(), angle.sin()))


def by_tokens(memory: Poisoned, x: Tensor) -> Tensor:
    """The same numbers as a view [B, H, T, d] of columns [B, T, (2 + H) d] whose other ones are NaN."""
    batch, heads, tokens, width = x.shape
    columns = memory.empty(batch, tokens, 2 + heads, width, dtype=x.dtype)
    return columns[:, :, 1:-1].transpose(1, 2).copy_(x)


@pytest.mark.parametrize("by_sample", [False, True])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_gradient_equal_the_reference(shape, dtype, inverse, by_sample):
    memory = Poisoned()
    x = memory.of(randn(*shape, dtype=dtype)).requires_grad_()
    dout = memory.of(randn(*shape, dtype=dtype, seed=1))
    table = angles(*shape[2:], memory, shape[0] if by_sample else None)
    out = rotate(x, *table, inverse)
    (dx,) = torch.autograd.grad(out, x, dout)
    results = []
    for wide in (dtype, torch.float64):
        leaf = x.detach().to(wide).requires_grad_()
        plain = reference(leaf, *(t.to(wide) if wide == torch.float64 else t for t in table), inverse)
        results.append([plain, *torch.autograd.grad(plain, leaf, dout.to(wide))])
    assert_near([out, dx], *results)
    memory.check()


@pytest.mark.parametrize("by_sample", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_views_go_into_views_of_another_dtype(dtype, out_dtype, batch, by_sample):
    memory, x = Poisoned(), randn(batch, 3, 5, 10, dtype=dtype)
    table = angles(5, 10, memory, batch if by_sample else None)
    source = by_tokens(memory, x)
    columns = memory.empty(batch, 5, 5, 10, dtype=out_dtype)
    out = columns[:, :, 1:-1].transpose(1, 2)
    assert rotate(source, *table, inverse=True, out=out) is out
    torch.testing.assert_close(out, rotate(x.float(), *table, inverse=True).to(out_dtype), rtol=0, atol=0)
    assert columns[:, :, [0, -1]].isnan().all()  # the columns beside it are as they were
    memory.check()


@pytest.mark.parametrize("heads", [1, 2, 3])
def test_a_table_for_each_sample_gives_each_the_bits_of_its_own(heads):
    x, table = randn(3, heads, 5, 10), angles(5, 10, samples=3)
    for sample, rotated in enumerate(rotate(x, *table)):
        own = [t[sample, 0].contiguous() for t in table]
        assert torch.equal(rotated, rotate(x[sample : sample + 1], *own)[0])
    same = [t[:1].expand(3, -1, -1, -1).contiguous() for t in table]
    assert torch.equal(rotate(x, *same), rotate(x, *(t[0, 0].contiguous() for t in table)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 5, 10), (1, 2, 3, 70)])
def test_in_place_gives_the_same_bits(shape, dtype):
    memory = Poisoned()
    x, table = randn(*shape, dtype=dtype), angles(*shape[2:], memory)
    expected, view = rotate(x, *table), by_tokens(memory, x)
    assert rotate(view, *table, out=view) is view
    torch.testing.assert_close(view, expected, rtol=0, atol=0)
    memory.check()


@pytest.mark.parametrize("samples", [None, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_equals_that_of_megatsp(dtype, samples):
    x, table = randn(2, 3, 5, 10, dtype=dtype), angles(5, 10, samples=samples)
    view = by_tokens(Poisoned(), x)
    for ours, theirs in (
        (rotate(view, *table), rotary.rotate(view, *table)),
        (rotate(view, *table, inverse=True), rotary.rotate(view, *table, inverse=True)),
    ):
        assert ours.stride() == theirs.stride()
        # One product is fused into the sum, by one of them: a unit in the last place, of terms of size 1.
        torch.testing.assert_close(ours, theirs, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_it_works_on_fake_tensors():
    with FakeTensorMode():
        x = torch.empty(2, 5, 3, 10, dtype=torch.bfloat16).transpose(1, 2)
        cos = torch.empty(5, 5)
        assert rotate(x, cos, cos).stride() == x.stride()
        by_sample = torch.empty(2, 1, 5, 5)
        assert rotate(x, by_sample, by_sample).stride() == x.stride()
        out = torch.empty(2, 3, 5, 10)
        assert rotate(x, cos, cos, out=out) is out


def test_the_custom_ops_are_what_they_say():
    x, table = randn(1, 2, 3, 4), angles(3, 4)
    torch.library.opcheck(_rotate, (x.clone().requires_grad_(), *table, False))
    torch.library.opcheck(_rotate_into, (x, *table, False, torch.empty_like(x)))


X, TABLE = torch.zeros(1, 2, 3, 4, device=DEVICE), torch.zeros(3, 2, device=DEVICE)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rotate(X.double(), TABLE, TABLE), "x is float64; it takes float32, float16, bfloat16"),
        (lambda: rotate(X, TABLE.half(), TABLE), "cos is float16; it takes float32"),
        (lambda: rotate(X[0], TABLE, TABLE), r"x must be \[B, H, T, d\].*got \(2, 3, 4\)"),
        (lambda: rotate(X[..., :3], TABLE, TABLE), r"d even, from 2 to 1024; got \(1, 2, 3, 3\)"),
        (lambda: rotate(X[..., :1].expand(1, 2, 3, 1026), TABLE, TABLE), "from 2 to 1024"),
        (lambda: rotate(X, TABLE, TABLE[:2]), r"sin must be contiguous and \(3, 2\).*got \(2, 2\)"),
        (lambda: rotate(X, TABLE[None, None], TABLE), r"sin must be contiguous and \(1, 1, 3, 2\)"),
        (lambda: rotate(X[:, :1], TABLE.expand(2, 1, 3, 2), TABLE), r"cos must be .*and \(1, 1, 3, 2\)"),
        (lambda: rotate(X, TABLE[:, :1].expand(3, 2), TABLE), r"cos must be contiguous.*strides \(2, 0\)"),
        (lambda: rotate(X[..., :1].expand(1, 2, 3, 4), TABLE, TABLE), r"last dim of x must be contiguous"),
        (lambda: rotate(X, TABLE, TABLE, out=X[:, :1]), r"out must be as x, \(1, 2, 3, 4\)"),
        (lambda: rotate(X, TABLE, TABLE, out=X[:, :1].expand(1, 2, 3, 4)), "expanded tensor"),
        (lambda: rotate(X, TABLE, TABLE, out=X.double()), "out is float64"),
        (lambda: rotate(X.clone().requires_grad_(), TABLE, TABLE, out=X), "with out it has no gradient"),
    ],
)
def test_what_it_does_not_take_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
