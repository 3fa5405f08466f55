"""Low-rank adapters: what W + s B A adds to the products with W's buckets, as activations.

In its h-major view (see buckets.py) a matrix is [h, n] and its adapter outer^T inner^T:

    outer [r, h]    A of a matrix that reads the residual width (q, k, v, gate, up), B^T of one that writes it
    inner [n, r]    B, or A^T

Then both directions of every matrix are one of two sums, done bucket by bucket with the rows of inner that
are the bucket's columns:

    rows [N, h] to columns [N, n]:   += (s rows outer^T) inner^T      x to q; dy to the gradient of o's input
    columns [N, n] to rows [N, h]:   += (s columns inner) outer       o's input to y; dq to dx

outer is cut over h and arrives whole with the norm gains; inner is whole on every tsp rank (under tp it is
cut as its matrix is). W + s B A itself is never formed: a frozen W may be bf16, on whose grid a small
update is rounded away.

Source: Hu et al., LoRA, arXiv:2106.09685.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatsp.tsp.buckets import Bucket
from megatsp.tsp.linear import Total

# A layer's matrices are q, k, v, o, gate, up, down, of which the first four are attention's.
ATTENTION_MATRICES = 4
_WRITERS = (3, 6)


@dataclass(frozen=True)
class AdapterPair:
    """One matrix's A and B on this rank, as parameters; matrix: its number in the layer."""

    matrix: int
    a: Tensor
    b: Tensor

    @property
    def outer(self) -> Tensor:
        """[r, h/D]; under tp [r, h]."""
        return self.b.t() if self.matrix in _WRITERS else self.a

    @property
    def inner(self) -> Tensor:
        """[n, r]; under tp the rows of this rank's columns."""
        return self.a.t() if self.matrix in _WRITERS else self.b

    def as_parameters(self, outer: Tensor, inner: Tensor) -> list[Tensor]:
        """From gradients like `outer` and `inner` to those of A and B."""
        pair = (inner.t(), outer.t()) if self.matrix in _WRITERS else (outer, inner)
        return [gradient.contiguous() for gradient in pair]


@dataclass(frozen=True)
class Adapter:
    """One matrix's adapter in the compute dtype, outer whole; matrix: its number in its part."""

    matrix: int
    outer: Tensor
    inner: Tensor


class Adapters:
    """The adapters of some of a part's matrices; of none, everything below does nothing."""

    def __init__(self, adapters: Sequence[Adapter] = (), scale: float = 1.0) -> None:
        self._adapters, self._scale = adapters, scale

    def spread(self, rows: Tensor, start: int, stop: int) -> "Spread":
        """From rows [N, h] to columns of the matrices `start` to `stop`, in one walk."""
        return Spread(self._between(start, stop), self._scale, rows, start, stop)

    def collect(self, start: int, stop: int, num_buckets: int) -> "Collected":
        """From columns of the matrices `start` to `stop` to rows, summed over a walk."""
        return Collected(self._between(start, stop), self._scale, start, stop, num_buckets)

    def _between(self, start: int, stop: int) -> list[Adapter]:
        return [adapter for adapter in self._adapters if start <= adapter.matrix < stop]


NO_ADAPTERS = Adapters()


class Spread:
    """rows through the adapters, bucket by bucket; columns lie side by side: [N, sum of widths]."""

    def __init__(
        self, adapters: Sequence[Adapter], scale: float, rows: Tensor, start: int, stop: int
    ) -> None:
        self._adapters, self._start, self._stop = adapters, start, stop
        if adapters:
            outer = torch.cat([adapter.outer for adapter in adapters])
            self._low = (rows @ outer.t()).mul_(scale).split([len(adapter.outer) for adapter in adapters], 1)
        self._gradients: list[Tensor] = []

    def add_to(self, product: Tensor, bucket: Bucket) -> None:
        """Adds the adapters' share to rows times the bucket's columns."""
        if not self._adapters:
            return
        pieces = _pieces(product, bucket, self._start, self._stop)
        for adapter, low in zip(self._adapters, self._low, strict=True):
            pieces[adapter.matrix - self._start].addmm_(low, _rows(adapter, bucket).t())

    def learn(self, columns: Tensor, bucket: Bucket) -> None:
        """Gradients of inner from the product's own gradient, or from what the product is the gradient of."""
        if not self._adapters:
            return
        if not self._gradients:
            self._gradients = [torch.empty_like(a.inner, dtype=torch.float32) for a in self._adapters]
        pieces = _pieces(columns, bucket, self._start, self._stop)
        for adapter, low, gradient in zip(self._adapters, self._low, self._gradients, strict=True):
            span = bucket[adapter.matrix]
            gradient[span.start : span.stop] = pieces[adapter.matrix - self._start].t() @ low

    def inner_gradients(self) -> list[Tensor]:
        """Once all buckets were learnt from: fp32 [n, r] each, of this rank's tokens."""
        return self._gradients


class Collected:
    """Columns through the adapters, summed over buckets."""

    def __init__(
        self, adapters: Sequence[Adapter], scale: float, start: int, stop: int, num_buckets: int
    ) -> None:
        self._adapters, self._scale, self._start, self._stop = adapters, scale, start, stop
        self._sums = [Total(num_buckets) for _ in adapters]
        self._low: Tensor | None = None

    def add(self, columns: Tensor, bucket: Bucket) -> None:
        """columns: [N, sum of widths], side by side."""
        if not self._adapters:
            return
        pieces = _pieces(columns, bucket, self._start, self._stop)
        for adapter, total in zip(self._adapters, self._sums, strict=True):
            total.add(pieces[adapter.matrix - self._start], _rows(adapter, bucket))

    def add_to(self, total: Total) -> None:
        """Adds the adapters' share [N, h] to what the walk summed up."""
        if self._adapters:
            total.add(self._scaled(), torch.cat([adapter.outer for adapter in self._adapters]))

    def outer_gradients(self, rows: Tensor) -> list[Tensor]:
        """rows [N, h]: what stands across the rows. fp32 [r, h] each, of this rank's tokens."""
        if not self._adapters:
            return []
        ranks = [len(adapter.outer) for adapter in self._adapters]
        return list((self._scaled().t() @ rows).float().split(ranks))

    def _scaled(self) -> Tensor:
        """s columns inner of all adapters, side by side, in the compute dtype."""
        if self._low is None:
            shape = (-1, len(self._adapters[0].outer))
            wide = torch.cat([total.value(shape) for total in self._sums], 1)
            self._low = wide.mul_(self._scale).to(self._adapters[0].outer.dtype)
        return self._low


@dataclass(frozen=True)
class AdapterGradients:
    """By adapter, in the order of the part's matrices: fp32 [r, h] and [n, r], of this rank's tokens."""

    outer: list[Tensor]
    inner: list[Tensor]

    def __add__(self, other: "AdapterGradients") -> "AdapterGradients":
        return AdapterGradients([*self.outer, *other.outer], [*self.inner, *other.inner])


class AdaptersBackward:
    """The adapters of a part in its backward. All its matrices but the last read x; the last writes y.

    rows, drows: x and dy, [N, h]. Columns are [N, sum of widths] of a bucket's matrices, side by side.
    """

    def __init__(
        self, adapters: Adapters, rows: Tensor, drows: Tensor, matrices: int, num_buckets: int
    ) -> None:
        last = matrices - 1
        self.low = adapters.spread(rows, 0, last)  # to what was projected, if that is computed again
        self._dlow_out = adapters.spread(drows, last, matrices)
        self._dlow = adapters.collect(0, last, num_buckets)
        self._low_out = adapters.collect(last, matrices, num_buckets)
        self._rows, self._drows = rows, drows

    def add_to_output(self, doutput: Tensor, bucket: Bucket) -> None:
        """Adds to the gradient of what the last matrix was multiplied with."""
        self._dlow_out.add_to(doutput, bucket)

    def output(self, output: Tensor, bucket: Bucket) -> None:
        """Takes what the last matrix was multiplied with."""
        self._low_out.add(output, bucket)
        self._dlow_out.learn(output, bucket)

    def projected(self, dprojected: Tensor, bucket: Bucket) -> None:
        """Takes the gradient of what the others gave."""
        self._dlow.add(dprojected, bucket)
        self.low.learn(dprojected, bucket)

    def add_to(self, dx: Total) -> None:
        """Adds the adapters' share to the gradient of x, after the walk."""
        self._dlow.add_to(dx)

    def gradients(self) -> AdapterGradients:
        return AdapterGradients(
            [*self._dlow.outer_gradients(self._rows), *self._low_out.outer_gradients(self._drows)],
            [*self.low.inner_gradients(), *self._dlow_out.inner_gradients()],
        )


def of_parts(
    pairs: Sequence[AdapterPair], outer: Tensor, scale: float, dtype: torch.dtype
) -> tuple[Adapters, Adapters]:
    """Attention's adapters and the MLP's; outer: all of them, whole, one below the other: [sum of r, h]."""
    if not pairs:
        return NO_ADAPTERS, NO_ADAPTERS
    attention: list[Adapter] = []
    mlp: list[Adapter] = []
    for pair, rows in zip(pairs, outer.split([len(pair.outer) for pair in pairs]), strict=True):
        in_mlp = pair.matrix >= ATTENTION_MATRICES
        number = pair.matrix - ATTENTION_MATRICES if in_mlp else pair.matrix
        (mlp if in_mlp else attention).append(Adapter(number, rows.to(dtype), pair.inner.to(dtype)))
    return Adapters(attention, scale), Adapters(mlp, scale)


def _rows(adapter: Adapter, bucket: Bucket) -> Tensor:
    span = bucket[adapter.matrix]
    return adapter.inner[span.start : span.stop]


def _pieces(columns: Tensor, bucket: Bucket, start: int, stop: int) -> tuple[Tensor, ...]:
    return columns.split([span.width for span in bucket[start:stop]], 1)
