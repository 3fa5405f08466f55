"""The operations that a layer is made of, whoever computes them.

torch's own are in this package and in model/rotary.py, Triton's in `megatsp_kernels`; kernels.py chooses.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from megatsp.cp.fused import FusedBlock
from megatsp.cp.local import BlockAttention
from megatsp.tsp.loss import BucketLoss


class Norm(Protocol):
    """RMSNorm over the last dim: see megatsp/tsp/norm.py."""

    def rms_norm(self, x: Tensor, gain: Tensor, epsilon: float) -> Tensor: ...

    def add_rms_norm(
        self, x: Tensor, update: Tensor, gain: Tensor, epsilon: float, inplace: bool = False
    ) -> tuple[Tensor, Tensor]: ...

    def rms_norm_backward(
        self, dy: Tensor, x: Tensor, gain: Tensor, epsilon: float, dresidual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]: ...


class SwiGLU(Protocol):
    """silu(gate) * up of columns that lie side by side: see megatsp/tsp/swiglu.py."""

    def swiglu(self, gate_up: Tensor) -> Tensor: ...

    def swiglu_backward(
        self, dout: Tensor, gate_up: Tensor, inplace: bool = False
    ) -> tuple[Tensor, Tensor]: ...


class Rotary(Protocol):
    """The rotation by position: see megatsp/model/rotary.py. cos, sin: [T, d/2] or [B, 1, T, d/2]."""

    def rotate(
        self, x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False, out: Tensor | None = None
    ) -> Tensor: ...


@dataclass(frozen=True)
class Kernels:
    """One implementation of each operation, resolved for a device."""

    attention: BlockAttention | FusedBlock
    norm: Norm
    rotary: Rotary
    swiglu: SwiGLU
    loss: BucketLoss
