"""RMSNorm equals the plain text, Hugging Face's and megatsp's, and touches nothing beside its tensors.

The interpreter truncates fp32 to bf16 where a GPU rounds: on a CPU fp16 stands for it (see checks.py).
"""

import pytest
import torch
from checks import DEVICE, DTYPES, Poisoned, assert_near, randn
from megatsp_kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_backward
from megatsp_kernels.rms_norm import reference as plain
from megatsp_kernels.rms_norm.op import _add_forward, _add_forward_, _backward, _forward
from torch._subclasses.fake_tensor import FakeTensorMode

from megatsp.tsp import norm as streamed

EPSILON = 1e-5
# Odd and even widths, several rows a tile and tiles of one row, none; a row by parts, odd and not a multiple.
SHAPES = [(1, 1), (7, 33), (2, 3, 16), (37, 5), (3, 70), (0, 4), (2, 0, 8), (5, 8200), (16,)]


def nan_apart(x: torch.Tensor) -> torch.Tensor:
    """The same numbers as a view of heads [B, T, H, d] in a wider tensor of NaN."""
    wide = torch.full(
        (*x.shape[:2], x.shape[2] + 3, x.shape[3]), float("nan"), dtype=x.dtype, device=x.device
    )
    wide[:, :, 1:-2] = x
    return wide[:, :, 1:-2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_gradients_equal_the_reference(shape, dtype):
    epsilon = 0.5 if shape[-1] == 1 else EPSILON  # one number over its size has no gradient but by epsilon
    memory = Poisoned()
    x = memory.of(randn(*shape, dtype=dtype)).requires_grad_()
    gain = memory.of(randn(shape[-1], seed=1)).requires_grad_()
    dy = memory.of(randn(*shape, dtype=dtype, seed=2))
    y = rms_norm(x, gain, epsilon)
    ours = torch.autograd.grad(y, [x, gain], dy)
    theirs = plain.rms_norm(x, gain, epsilon)
    gradients = torch.autograd.grad(theirs, [x, gain], dy)
    # Only the rounding of y and the gain differs from fp64; gradients are of the gain as it is.
    rounded = gain.to(dtype).double()
    exact = plain.rms_norm(x.double(), rounded, epsilon)
    truth = plain.rms_norm_backward(dy.double(), x.double(), gain.double(), epsilon)
    assert_near([y, ours[0]], [theirs, gradients[0]], [exact, truth[0]])
    assert_near([ours[1]], [gain], [truth[1]])
    memory.check()


@pytest.mark.parametrize("update_dtype", ["own", "float32"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7, 33), (2, 3, 16), (0, 4), (3, 8200)])
def test_the_sum_and_every_gradient_equal_the_reference(shape, dtype, update_dtype):
    memory = Poisoned()
    x = memory.of(randn(*shape, dtype=dtype)).requires_grad_()
    update_dtype = dtype if update_dtype == "own" else torch.float32
    update = memory.of(randn(*shape, dtype=update_dtype, seed=1)).requires_grad_()
    gain = memory.of(randn(shape[-1], dtype=dtype, seed=2)).requires_grad_()
    douts = [memory.of(randn(*shape, dtype=dtype, seed=seed)) for seed in (3, 4)]
    total, y = add_rms_norm(x, update, gain, EPSILON)
    torch.testing.assert_close(total, (x.float() + update.float()).to(dtype), rtol=0, atol=0)
    assert_near([y], [plain.rms_norm(total, gain, EPSILON)], [plain.rms_norm(total.double(), gain, EPSILON)])
    dx, dupdate, dgain = torch.autograd.grad([total, y], [x, update, gain], douts)
    truth, dgain_truth = plain.rms_norm_backward(*(t.double() for t in (douts[1], total, gain)), EPSILON)
    truth = truth + douts[0].double()
    assert_near([dx, dupdate], [truth.to(dtype), truth.to(update_dtype)], [truth, truth])
    assert_near([dgain], [dgain_truth.to(dtype)], [dgain_truth])
    memory.check()


@pytest.mark.parametrize("used", [0, 1])
def test_one_of_the_sums_two_results_may_go_unused(used):
    x, update = (randn(5, 9, seed=s).requires_grad_() for s in (0, 1))
    gain, dout = randn(9), randn(5, 9, seed=2)
    ours = torch.autograd.grad(add_rms_norm(x, update, gain, EPSILON)[used], [x, update], dout)
    theirs = torch.autograd.grad(plain.add_rms_norm(x, update, gain, EPSILON)[used], [x, update], dout)
    assert_near(ours, theirs, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place_the_sum_overwrites_the_update_with_the_same_bits(dtype):
    memory = Poisoned()
    x, update = (memory.of(randn(5, 35, dtype=dtype, seed=s)) for s in (0, 1))
    gain = memory.of(randn(35, seed=2))
    expected = add_rms_norm(x, update.clone(), gain, EPSILON)
    before = x.clone()
    total, y = add_rms_norm(x, update, gain, EPSILON, inplace=True)
    assert total is update
    torch.testing.assert_close((total, y, x), (*expected, before), rtol=0, atol=0)
    memory.check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_of_heads_equal_contiguous_ones_bit_for_bit(dtype):
    tensors = [randn(2, 3, 4, 10, dtype=dtype, seed=seed) for seed in range(4)]
    views, gain = [nan_apart(t) for t in tensors], randn(10)
    for function, count in (
        (lambda x: [rms_norm(x, gain, EPSILON)], 1),
        (lambda x, update: add_rms_norm(x, update, gain, EPSILON), 2),
        (lambda dy, x, residual: rms_norm_backward(dy, x, gain, EPSILON, residual), 3),
    ):
        expected, got = function(*tensors[:count]), function(*views[:count])
        torch.testing.assert_close(list(got), list(expected), rtol=0, atol=0)
        assert not any(t.isnan().any() for t in got) and got[0].is_contiguous()


@pytest.mark.parametrize("dtype", [None, *DTYPES])
@pytest.mark.parametrize("shape", [(7, 33), (3, 8200), (0, 4)])
def test_the_backward_adds_the_residuals_gradient_in_fp32(shape, dtype):
    memory = Poisoned()
    dy, x = memory.of(randn(*shape)), memory.of(randn(*shape, dtype=DTYPES[1], seed=1))
    gain = memory.of(randn(shape[-1], seed=2))
    dresidual = None if dtype is None else memory.of(randn(*shape, dtype=dtype, seed=3))
    got = rms_norm_backward(dy, x, gain, EPSILON, dresidual)
    again = rms_norm_backward(dy, x, gain, EPSILON, dresidual)
    dx, dgain = plain.rms_norm_backward(dy.double(), x.double(), gain.double(), EPSILON)
    exact = dx if dresidual is None else dx + dresidual, dgain
    assert_near(got, [dy, gain], exact)
    torch.testing.assert_close(again, got, rtol=0, atol=0)
    memory.check()


def test_rows_past_the_end_add_nothing_when_epsilon_is_zero():
    dy, x, gain = randn(3, 8), randn(3, 8, seed=1), randn(8)  # tiles of 8 rows in the interpreter
    exact = plain.rms_norm_backward(dy.double(), x.double(), gain.double(), 0.0)
    assert_near(rms_norm_backward(dy, x, gain, 0.0), [dy, gain], exact)


@pytest.mark.parametrize("gain_dtype", ["own", "float32"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_casts_are_in_the_order_of_hugging_face_and_of_megatsp(dtype, gain_dtype):
    x = randn(40, 33, dtype=dtype)
    gain = randn(33, dtype=dtype if gain_dtype == "own" else torch.float32, seed=1)
    y = rms_norm(x, gain, EPSILON)
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    llama = modeling.LlamaRMSNorm(33, EPSILON).to(DEVICE)
    llama.weight = torch.nn.Parameter(gain.to(dtype))
    once = (plain.rms_norm(x.float(), gain.float(), EPSILON)).to(dtype)  # one rounding, at the end
    for theirs in (llama(x), streamed.rms_norm(x, gain, EPSILON)):
        if dtype == torch.float32:
            assert_near([y], [theirs], [theirs])
        else:
            # Another order of the sum moves a few numbers over a rounding boundary, another of casts many.
            torch.testing.assert_close(y, theirs, rtol=2 * torch.finfo(dtype).eps, atol=0)
            assert (y != theirs).float().mean() < 0.01 < (once != theirs).float().mean() / 10


def test_the_backward_equals_that_of_megatsp():
    dy, x, gain = randn(6, 33), randn(6, 33, dtype=DTYPES[1], seed=1), randn(33, seed=2)
    ours, theirs = (f(dy, x, gain, EPSILON) for f in (rms_norm_backward, streamed.rms_norm_backward))
    assert_near(ours, theirs, theirs)


def test_it_works_on_fake_tensors():
    with FakeTensorMode():
        x = torch.empty(2, 3, 8, 10, dtype=torch.bfloat16)[:, :, 1:5]
        gain = torch.empty(10)
        assert rms_norm(x, gain, EPSILON).stride() == (120, 40, 10, 1)
        assert [t.dtype for t in add_rms_norm(x, x.float(), gain, EPSILON)] == [torch.bfloat16] * 2
        dx, dgain = rms_norm_backward(x, x, gain, EPSILON, x)
        assert (dx.dtype, dx.shape, dgain.shape) == (torch.float32, (2, 3, 4, 10), (10,))


def test_the_custom_ops_are_what_they_say():
    x, update = randn(3, 5).requires_grad_(), randn(3, 5, seed=1).requires_grad_()
    gain = randn(5).requires_grad_()
    torch.library.opcheck(_forward, (x, gain, EPSILON))
    torch.library.opcheck(_add_forward, (x, update, gain, EPSILON))
    x, update, gain = x.detach(), update.detach(), gain.detach()
    torch.library.opcheck(_add_forward_, (x, update, gain, EPSILON))
    torch.library.opcheck(_backward, (update, x, gain, EPSILON, None, torch.float32))


ROWS, GAIN = torch.zeros(3, 4, device=DEVICE), torch.zeros(4, device=DEVICE)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rms_norm(ROWS.double(), GAIN, 1e-5), "x is float64; it takes float32, float16, bfloat16"),
        (
            lambda: rms_norm(ROWS, GAIN.half(), 1e-5),
            "gain is float16; beside x of float32 it is that or float32",
        ),
        (lambda: rms_norm(ROWS, GAIN[:3], 1e-5), r"gain must be contiguous \[4\].*got \(3,\)"),
        (lambda: rms_norm(ROWS[:, :0], GAIN[:0], 1e-5), r"n from 1 to 16384; got \(3, 0\)"),
        (lambda: rms_norm(ROWS[:1, :1].expand(2, 16385), GAIN, 1e-5), r"n from 1 to 16384; got \(2, 16385\)"),
        (lambda: rms_norm(ROWS.t(), GAIN[:3], 1e-5), r"strides \(1, 4\).*call contiguous\(\)"),
        (
            lambda: rms_norm(torch.zeros(3, 5, 7, 4, device=DEVICE)[:, ::2, 1:4], GAIN, 1e-5),
            r"strides \(140, 56, 4, 1\).*two strides at most",
        ),
        (lambda: add_rms_norm(ROWS, ROWS[:2], GAIN, 1e-5), r"update is \(2, 4\); it must be as x, \(3, 4\)"),
        (lambda: add_rms_norm(ROWS, ROWS.half(), GAIN, 1e-5), "update is float16; beside x of float32"),
        (
            lambda: add_rms_norm(ROWS.half(), ROWS, GAIN, 1e-5, inplace=True),
            "in place, update must be contiguous and of x's dtype float16; got float32",
        ),
        (
            lambda: add_rms_norm(ROWS, torch.zeros(3, 8, device=DEVICE)[:, :4], GAIN, 1e-5, inplace=True),
            r"in place, update must be contiguous.*strides \(8, 1\)",
        ),
        (
            lambda: add_rms_norm(ROWS, ROWS.clone().requires_grad_(), GAIN, 1e-5, inplace=True),
            "in place it has no gradient",
        ),
        (lambda: rms_norm_backward(ROWS[:2], ROWS, GAIN, 1e-5), r"dy is \(2, 4\); it must be as x"),
        (lambda: rms_norm_backward(ROWS, ROWS, GAIN, 1e-5, ROWS.double()), "dresidual is float64"),
    ],
)
def test_what_it_does_not_take_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
