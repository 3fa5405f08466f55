"""torch's SwiGLU: its backward equals autograd's, and writes over what it may alone."""

import pytest
import torch

from megatsp.tsp.swiglu import swiglu, swiglu_backward


@pytest.mark.parametrize("inplace", [False, True])
def test_backward_equals_autograd(inplace):
    generator = torch.Generator().manual_seed(1)
    gate_up = torch.randn(3, 10, generator=generator, dtype=torch.float64, requires_grad=True)
    dout = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    gate, up = gate_up.chunk(2, -1)
    expected = torch.nn.functional.silu(gate) * up
    expected.backward(dout)
    given = dout.clone()
    dgate_up, out = swiglu_backward(given, gate_up.detach(), inplace)
    torch.testing.assert_close(dgate_up, gate_up.grad)
    torch.testing.assert_close((out, swiglu(gate_up.detach())), (expected.detach(), expected.detach()))
    assert torch.equal(given, dout) == (not inplace)
