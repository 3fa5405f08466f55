"""A gated MLP with streamed weights: y += (silu(x W_g^T) * (x W_u^T)) W_d^T per bucket of columns.

Source: Shazeer, GLU variants, arXiv:2002.05202 (SwiGLU).
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megatsp.tsp.buckets import Bucket
from megatsp.tsp.linear import accumulate, product
from megatsp.tsp.stream import WeightStream
from megatsp.tsp.transport import Gradients


class StreamedMLP:
    """One layer's MLP; `stream` brings its weights. Columns of a bucket: gate, up, down."""

    def __init__(self, stream: WeightStream) -> None:
        self._stream = stream

    def prefetch(self, weights: Sequence[Tensor]) -> None:
        self._stream.prefetch(weights)

    def forward(
        self,
        x: Tensor,
        weights: Sequence[Tensor],
        keep: bool,
        following: Callable[[], None] | None,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """x: [B, T/D, h], normalised. Returns y in fp32 and, if `keep`, gate and up columns by step."""
        y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        rows, saved = x.flatten(0, 1), {}

        def use(step: int, bucket: Bucket, matrix: Tensor) -> None:
            width = bucket[0].width
            gate_up = rows @ matrix[:, : 2 * width]
            gate, up = gate_up.chunk(2, -1)
            accumulate(y.flatten(0, 1), F.silu(gate) * up, matrix[:, 2 * width :].t())
            if keep:
                saved[step] = gate_up

        self._stream.walk(weights, use, following)
        return y, saved

    def backward(
        self,
        dy: Tensor,
        x: Tensor,
        weights: Sequence[Tensor],
        saved: dict[int, Tensor],
        following: Callable[[], None] | None,
    ) -> tuple[Tensor, Gradients]:
        """dy: [B, T/D, h] in the compute dtype; what `saved` lacks is computed again.

        Returns dx in fp32 and the weight gradients (the last bucket's still on its way: see
        `Gradients.finish`). Empties `saved` as it goes.
        """
        dx = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        rows, drows = x.flatten(0, 1), dy.flatten(0, 1)
        gradients = self._stream.gradients(weights)

        def use(step: int, bucket: Bucket, matrix: Tensor) -> None:
            width = bucket[0].width
            gate_up = saved.pop(step) if step in saved else rows @ matrix[:, : 2 * width]
            dgate_up, activation = _swiglu_backward(drows @ matrix[:, 2 * width :], gate_up)
            dmatrix = gradients.buffer(step)
            product(dmatrix[:, : 2 * width], rows.t(), dgate_up)
            product(dmatrix[:, 2 * width :], drows.t(), activation)
            gradients.send(step, dmatrix)
            accumulate(dx.flatten(0, 1), dgate_up, matrix[:, : 2 * width].t())

        self._stream.walk(weights, use, following)
        return dx, gradients


def _swiglu_backward(dactivation: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of (gate, up), and the activation silu(gate) * up again; in gate_up's dtype."""
    gate, up = gate_up.float().chunk(2, -1)
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    activation = (silu * up).to(gate_up.dtype)
    dgate_up = torch.empty_like(gate_up)
    dgate, dup = dgate_up.chunk(2, -1)
    dup.copy_(dactivation * silu)
    # silu' = sigmoid + silu (1 - sigmoid); in place, for this is where a step's memory peaks
    sigmoid += silu.mul_(1 - sigmoid)
    dgate.copy_(sigmoid.mul_(up).mul_(dactivation))
    return dgate_up, activation
