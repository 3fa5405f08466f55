"""SwiGLU equals the plain text, forward and backward, and touches nothing beside its tensors."""

import pytest
import torch
from checks import DTYPES, Poisoned, assert_near, randn
from megatsp_kernels.swiglu import swiglu, swiglu_backward
from megatsp_kernels.swiglu.op import _backward, _backward_, _forward
from megatsp_kernels.swiglu.reference import swiglu as reference
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

SHAPES = [(1, 1), (7, 33), (2, 3, 16), (5, 17), (0, 4)]  # [.., F]


def gradient(gate_up: Tensor, dout: Tensor) -> Tensor:
    gate_up = gate_up.detach().requires_grad_()
    return torch.autograd.grad(reference(gate_up), gate_up, dout)[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_gradient_equal_the_reference(shape, dtype):
    memory = Poisoned()
    gate_up = memory.of(randn(*shape[:-1], 2 * shape[-1], dtype=dtype)).requires_grad_()
    dout = memory.of(randn(*shape, dtype=dtype, seed=1))
    out = swiglu(gate_up)
    (dgate_up,) = torch.autograd.grad(out, gate_up, dout)
    again = swiglu_backward(dout, gate_up.detach())
    exact = reference(gate_up.double()), gradient(gate_up.double(), dout.double())
    plain = reference(gate_up), gradient(gate_up, dout)
    assert_near([out, dgate_up], plain, exact)
    torch.testing.assert_close(again, (dgate_up, out.detach()), rtol=0, atol=0)
    memory.check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_in_place_the_backward_overwrites_both_with_the_same_bits(shape, dtype):
    memory = Poisoned()
    gate_up = memory.of(randn(*shape[:-1], 2 * shape[-1], dtype=dtype))
    dout = memory.of(randn(*shape, dtype=dtype, seed=1))
    expected = swiglu_backward(dout, gate_up)
    assert all(
        a is b for a, b in zip(swiglu_backward(dout, gate_up, inplace=True), (gate_up, dout), strict=True)
    )
    torch.testing.assert_close((gate_up, dout), expected, rtol=0, atol=0)
    memory.check()


def test_the_custom_ops_are_what_they_say():
    gate_up, dout = randn(3, 10), randn(3, 5)
    torch.library.opcheck(_forward, (gate_up.clone().requires_grad_(),))
    torch.library.opcheck(_backward, (dout, gate_up))
    torch.library.opcheck(_backward_, (dout, gate_up))


def test_it_works_on_fake_tensors():
    with FakeTensorMode():
        gate_up = torch.empty(3, 10, dtype=torch.bfloat16)
        dout = torch.empty(3, 5, dtype=torch.bfloat16)
        assert swiglu_backward(dout, gate_up, inplace=True)[0] is gate_up
        assert swiglu(gate_up).shape == (3, 5)
        assert [t.shape for t in swiglu_backward(torch.empty_like(gate_up[:, :5]), gate_up)] == [
            (3, 10),
            (3, 5),
        ]


@pytest.mark.parametrize(
    ("gate_up", "message"),
    [
        (torch.zeros(3, 5), r"contiguous \[\.\., 2F\].*got \(3, 5\)"),
        (torch.zeros(4, 6).t(), r"contiguous.*with strides \(1, 6\)"),
        (torch.zeros(3, 4, dtype=torch.float64), "gate_up is float64; it takes float32, float16, bfloat16"),
    ],
)
def test_what_it_does_not_take_is_refused(gate_up, message):
    with pytest.raises(ValueError, match=message):
        swiglu(gate_up)


def test_a_gradient_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"dout must be contiguous and \(3, 2\).*got \(3, 4\)"):
        swiglu_backward(torch.zeros(3, 4), torch.zeros(3, 4))
