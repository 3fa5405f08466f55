"""SwiGLU by torch's own kernels: silu(gate) * up of columns that lie side by side.

Source: Shazeer, GLU variants, arXiv:2002.05202.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(gate_up: Tensor) -> Tensor:
    """[.., 2F], gate first, to [.., F]."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate).mul_(up)


def swiglu_backward(dout: Tensor, gate_up: Tensor, inplace: bool = False) -> tuple[Tensor, Tensor]:
    """Gradient of `gate_up`, and the forward's result again; inplace: they may take the inputs' memory."""
    dout = dout if inplace else dout.clone()
    gate, up = gate_up.chunk(2, -1)
    dgate_up = torch.empty_like(gate_up)
    dgate, dup = dgate_up.chunk(2, -1)
    out = F.silu(gate)
    torch.mul(dout, out, out=dup)
    torch.ops.aten.silu_backward.grad_input(dout.mul_(up), gate, grad_input=dgate)
    return dgate_up, out.mul_(up)
