"""The plain text of SwiGLU: what op.py is tested against."""

from torch import Tensor
from torch.nn.functional import silu


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up in fp32. gate_up: [.., 2F], gate first. Returns [.., F] in its dtype."""
    gate, up = gate_up.float().chunk(2, -1)
    return (silu(gate) * up).to(gate_up.dtype)
