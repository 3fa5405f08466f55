"""Where a sublayer's norm stands: before it, x + f(norm(x)), or after it, x + norm(f(x)).

f is attention or the MLP. Both kinds serve one `_Layer`: they say what f reads, what it adds to x, and how
gradients come back through the norm.

Source: after: OLMo 2, arXiv:2501.00656, section 3.1.
"""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from megatsp.tsp.operations import Norm

# From the gradient of what f read [.., h] to that of x, fp32, and of the gain, fp32 [h].
Finish = Callable[[Tensor], tuple[Tensor, Tensor]]


class Residual(Protocol):
    """x, y, dx: [B, T_local, h]; gains: [h]. y is what f gave, in x's dtype or fp32."""

    keeps_outputs: bool  # whether the backward needs y, rounded to x's dtype

    def read(self, x: Tensor, gain: Tensor) -> Tensor:
        """What f reads."""

    def add(self, x: Tensor, y: Tensor, gain: Tensor) -> Tensor:
        """The sum, in x's dtype; it may take the memory of y, unless that is kept."""

    def add_and_read(self, x: Tensor, y: Tensor, gain: Tensor, next_gain: Tensor) -> tuple[Tensor, Tensor]:
        """The sum, and what the next sublayer reads."""

    def backward(self, dout: Tensor, x: Tensor, y: Tensor | None, gain: Tensor) -> tuple[Tensor, Finish]:
        """From the sum's gradient to that of y, in x's dtype, and what completes it. y: if it is kept."""


class NormBefore:
    """x + f(norm(x)), as in Llama."""

    keeps_outputs = False

    def __init__(self, norm: Norm, epsilon: float) -> None:
        self._norm, self._epsilon = norm, epsilon

    def read(self, x: Tensor, gain: Tensor) -> Tensor:
        return self._norm.rms_norm(x, gain, self._epsilon)

    def add(self, x: Tensor, y: Tensor, gain: Tensor) -> Tensor:
        del gain
        return y.add_(x).to(x.dtype)

    def add_and_read(self, x: Tensor, y: Tensor, gain: Tensor, next_gain: Tensor) -> tuple[Tensor, Tensor]:
        del gain
        # A sum over several buckets may be wider than x: its memory is not the total's then.
        return self._norm.add_rms_norm(x, y, next_gain, self._epsilon, inplace=y.dtype == x.dtype)

    def backward(self, dout: Tensor, x: Tensor, y: Tensor | None, gain: Tensor) -> tuple[Tensor, Finish]:
        del y
        return dout.to(x.dtype), lambda dread: self._norm.rms_norm_backward(
            dread, x, gain, self._epsilon, dout
        )


class NormAfter:
    """x + norm(f(x)), as in OLMo 2."""

    keeps_outputs = True

    def __init__(self, norm: Norm, epsilon: float) -> None:
        self._norm, self._epsilon = norm, epsilon

    def read(self, x: Tensor, gain: Tensor) -> Tensor:
        del gain
        return x

    def add(self, x: Tensor, y: Tensor, gain: Tensor) -> Tensor:
        return self._norm.rms_norm(y.to(x.dtype), gain, self._epsilon).add_(x)

    def add_and_read(self, x: Tensor, y: Tensor, gain: Tensor, next_gain: Tensor) -> tuple[Tensor, Tensor]:
        del next_gain
        total = self.add(x, y, gain)
        return total, total

    def backward(self, dout: Tensor, x: Tensor, y: Tensor | None, gain: Tensor) -> tuple[Tensor, Finish]:
        assert y is not None
        dy, dgain = self._norm.rms_norm_backward(dout, y, gain, self._epsilon)
        return dy.to(x.dtype), lambda dread: (dread.float().add_(dout), dgain)
