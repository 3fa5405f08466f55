"""A gated MLP with streamed weights: y += (silu(x W_g^T) * (x W_u^T)) W_d^T per bucket of columns.

Source: Shazeer, GLU variants, arXiv:2002.05202 (SwiGLU).
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from megatsp.tsp.buckets import Bucket, Columns
from megatsp.tsp.linear import Total
from megatsp.tsp.operations import SwiGLU
from megatsp.tsp.stream import WeightStream
from megatsp.tsp.transport import Gradients


class StreamedMLP:
    """One layer's MLP; `stream` brings its weights. Columns of a bucket: gate, up, down."""

    def __init__(self, stream: WeightStream, kernel: SwiGLU) -> None:
        self._stream, self._kernel = stream, kernel

    def prefetch(self, weights: Sequence[Tensor]) -> None:
        self._stream.prefetch(weights)

    def forward(
        self,
        x: Tensor,
        weights: Sequence[Tensor],
        keep: bool,
        following: Callable[[], None] | None,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """x: [B, T/D, h], normalised. Returns y (see `Total`) and, if `keep`, gate and up columns by step."""
        rows, y, saved = x.flatten(0, 1), Total(self._stream.steps), {}

        def use(step: int, bucket: Bucket, columns: Columns) -> None:
            gate_up = columns.times(rows, 0, 2)
            y.add(self._kernel.swiglu(gate_up), columns.pieces[2].t())
            if keep:
                saved[step] = gate_up

        self._stream.walk(weights, use, following)
        return y.value(x.shape), saved

    def backward(
        self,
        dy: Tensor,
        x: Tensor,
        weights: Sequence[Tensor],
        saved: dict[int, Tensor],
        following: Callable[[], None] | None,
    ) -> tuple[Tensor, Gradients]:
        """dy: [B, T/D, h] in the compute dtype; what `saved` lacks is computed again.

        Returns dx (see `Total`) and the weight gradients (the last bucket's still on its way: see
        `Gradients.finish`). Empties `saved` as it goes.
        """
        rows, drows, dx = x.flatten(0, 1), dy.flatten(0, 1), Total(self._stream.steps)
        gradients = self._stream.gradients(weights)

        def use(step: int, bucket: Bucket, columns: Columns) -> None:
            gate_up = saved.pop(step) if step in saved else columns.times(rows, 0, 2)
            dgate_up, activation = self._kernel.swiglu_backward(
                columns.times(drows, 2, 3), gate_up, inplace=True
            )
            del gate_up
            dcolumns = gradients.buffer(step)
            dcolumns.set(0, 2, rows.t(), dgate_up)
            dcolumns.set(2, 3, drows.t(), activation)
            gradients.send(step, dcolumns)
            dx.add_transposed(dgate_up, columns.first(2))

        self._stream.walk(weights, use, following)
        return dx.value(x.shape), gradients
