"""Products with the columns of a bucket, and sums of them over buckets.

What sums over several buckets is summed in fp32; a single bucket's product is in the compute dtype,
as in plain torch.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def project(rows: Tensor, columns: Sequence[Tensor]) -> Tensor:
    """rows [n, h] times each [h, m_i]: the products side by side, [n, sum of m]."""
    if len(columns) == 1:
        return rows @ columns[0]
    widths = [c.shape[1] for c in columns]
    out = rows.new_empty(rows.shape[0], sum(widths))
    for target, c in zip(out.split(widths, 1), columns, strict=True):
        torch.mm(rows, c, out=target)
    return out


def products(outs: Sequence[Tensor], a: Tensor, b: Tensor) -> None:
    """outs [h, m_i] become a [h, n] times b [n, sum of m]: the columns of the product, one after another."""
    for out, part in zip(outs, b.split([out.shape[1] for out in outs], 1), strict=True):
        if out.dtype == a.dtype:
            torch.mm(a, part, out=out)
        else:
            out.copy_(a @ part)


class Total:
    """A sum of products [n, m]: fp32 if they come from several buckets, else in the compute dtype."""

    def __init__(self, num_buckets: int) -> None:
        self._wide = num_buckets > 1
        self._sum: Tensor | None = None

    def add(self, a: Tensor, b: Tensor) -> None:
        """Adds a [n, k] times b [k, m]."""
        if self._sum is None:
            product = a @ b
            self._sum = product.float() if self._wide else product
        elif self._sum.dtype == a.dtype:
            self._sum.addmm_(a, b)
        else:
            self._sum += a @ b

    def add_by(self, add: Callable[[Tensor | None], Tensor]) -> None:
        """Adds what a kernel adds itself: `add` is given the fp32 sum so far, or None, and returns it."""
        self._sum = add(self._sum)

    def add_transposed(self, a: Tensor, columns: Sequence[Tensor]) -> None:
        """Adds a [n, sum of m] times the columns [h, m_i] side by side, transposed: [n, h]."""
        for part, c in zip(a.split([c.shape[1] for c in columns], 1), columns, strict=True):
            self.add(part, c.t())

    def value(self, shape: Sequence[int]) -> Tensor:
        """The sum, as `shape`; not a view, for autograd's sake."""
        assert self._sum is not None
        return torch.ops.aten._unsafe_view(self._sum, shape)
