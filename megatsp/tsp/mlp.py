"""A gated MLP with streamed weights: y += (silu(x W_g^T) * (x W_u^T)) W_d^T per bucket of columns.

Source: Shazeer, GLU variants, arXiv:2002.05202 (SwiGLU).
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from megatsp.tsp.buckets import Bucket, Columns
from megatsp.tsp.linear import Total
from megatsp.tsp.lora import NO_ADAPTERS, AdapterGradients, Adapters, AdaptersBackward, Spread
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
        adapters: Adapters = NO_ADAPTERS,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """x: [B, T/D, h], normalised. Returns y (see `Total`) and, if `keep`, gate and up columns by step."""
        rows, y, saved = x.flatten(0, 1), Total(self._stream.steps), {}
        low, low_activation = adapters.spread(rows, 0, 2), adapters.collect(2, 3, self._stream.steps)

        def use(step: int, bucket: Bucket, columns: Columns) -> None:
            gate_up = self._project(rows, columns, bucket, low)
            activation = self._kernel.swiglu(gate_up)
            y.add(activation, columns.pieces[2].t())
            low_activation.add(activation, bucket)
            if keep:
                saved[step] = gate_up

        self._stream.walk(weights, use, following)
        low_activation.add_to(y)
        return y.value(x.shape), saved

    def backward(
        self,
        dy: Tensor,
        x: Tensor,
        weights: Sequence[Tensor],
        saved: dict[int, Tensor],
        following: Callable[[], None] | None,
        adapters: Adapters = NO_ADAPTERS,
        frozen: bool = False,
    ) -> tuple[Tensor, Gradients, AdapterGradients]:
        """dy: [B, T/D, h] in the compute dtype; what `saved` lacks is computed again.

        Returns dx (see `Total`), the weight gradients (the last bucket's still on its way: see
        `Gradients.finish`; none if `frozen`) and the LOCAL tokens' share of the adapters'. Empties `saved`
        as it goes.
        """
        steps = self._stream.steps
        rows, drows, dx = x.flatten(0, 1), dy.flatten(0, 1), Total(steps)
        gradients = self._stream.gradients(weights, frozen)
        low = AdaptersBackward(adapters, rows, drows, 3, steps)

        def use(step: int, bucket: Bucket, columns: Columns) -> None:
            gate_up = saved.pop(step) if step in saved else self._project(rows, columns, bucket, low.low)
            dactivation = columns.times(drows, 2, 3)
            low.add_to_output(dactivation, bucket)
            dgate_up, activation = self._kernel.swiglu_backward(dactivation, gate_up, inplace=True)
            del gate_up, dactivation
            low.output(activation, bucket)
            low.projected(dgate_up, bucket)
            dcolumns = gradients.buffer(step)
            dcolumns.set(0, 2, rows.t(), dgate_up)
            dcolumns.set(2, 3, drows.t(), activation)
            gradients.send(step, dcolumns)
            dx.add_transposed(dgate_up, columns.first(2))

        self._stream.walk(weights, use, following)
        low.add_to(dx)
        return dx.value(x.shape), gradients, low.gradients()

    def _project(self, rows: Tensor, columns: Columns, bucket: Bucket, low: Spread) -> Tensor:
        """[B T/D, h] to the bucket's gate and up columns, side by side."""
        gate_up = columns.times(rows, 0, 2)
        low.add_to(gate_up, bucket)
        return gate_up
