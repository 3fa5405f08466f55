"""What a bucket of a layer holds.

Every matrix of the model has one dimension of the residual width h. Its h-MAJOR view has
that dimension first: [h, n], n the matrix's columns. A bucket is a range of columns of each
matrix it needs; what travels has them side by side in one [h, R] tensor (see `Columns`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from megatsp.tsp.linear import products, project


@dataclass(frozen=True)
class Matrix:
    """A weight matrix of the residual width: `h_dim` says which of its dims that is."""

    name: str
    h_dim: int
    columns: int


@dataclass(frozen=True)
class Span:
    """Columns [start, stop) of the matrix with this index in its part."""

    matrix: int
    start: int
    stop: int

    @property
    def width(self) -> int:
        return self.stop - self.start


Bucket = tuple[Span, ...]


@dataclass(frozen=True)
class Part:
    """The matrices of one streamed operation, cut into buckets."""

    label: str
    matrices: tuple[Matrix, ...]
    buckets: tuple[Bucket, ...]

    def views(self, index: int, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The bucket's columns in tensors like the part's matrices, or like slices of them over h."""
        return [h_major(tensors[s.matrix], self.matrices[s.matrix])[:, s.start : s.stop]
                for s in self.buckets[index]]  # fmt: skip


def h_major(weight: Tensor, matrix: Matrix) -> Tensor:
    """The [h, n] view of a weight (or of its gradient, or of a slice of either)."""
    return weight if matrix.h_dim == 0 else weight.t()


class Columns:
    """A bucket in memory: the [h, n] columns of each of its matrices, or of their gradients.

    pieces: one tensor a span. whole: [h, R], if the pieces lie side by side in it. wanted: False for
    gradients of frozen weights, which have no pieces.
    """

    wanted = True

    def __init__(self, pieces: Sequence[Tensor], whole: Tensor | None = None) -> None:
        self.pieces, self.whole = pieces, whole

    @classmethod
    def of(cls, whole: Tensor, bucket: Bucket) -> "Columns":
        return cls(whole.split([s.width for s in bucket], 1), whole)

    def first(self, count: int) -> Sequence[Tensor]:
        """The first `count` pieces, as one tensor where they lie side by side."""
        return self._between(0, count)

    def times(self, rows: Tensor, start: int, stop: int) -> Tensor:
        """rows [n, h] times pieces `start` to `stop`: the products side by side, [n, m]."""
        return project(rows, self._between(start, stop))

    def set(self, start: int, stop: int, a: Tensor, b: Tensor) -> None:
        """Pieces `start` to `stop` become a [h, n] times b [n, sum of their columns]."""
        products(self._between(start, stop), a, b)

    def _between(self, start: int, stop: int) -> Sequence[Tensor]:
        if self.whole is None:
            return self.pieces[start:stop]
        first, last = (sum(piece.shape[1] for piece in self.pieces[:n]) for n in (start, stop))
        return [self.whole[:, first:last]]


def width(bucket: Bucket) -> int:
    return sum(span.width for span in bucket)


def even_cuts(columns: int, count: int) -> list[int]:
    """Borders of `count` ranges over `columns` whose sizes differ by at most one."""
    return [i * columns // count for i in range(count + 1)]


def owner_cuts(columns: int, owners: int, per_owner: int = 1) -> list[int]:
    """Borders where each owner holds what DTensor's Shard gives it, cut `per_owner` times.

    Shard gives the first owners ceil(columns / owners) each; the last may hold fewer, or none.
    """
    chunk = -(-columns // owners)
    cuts = [0]
    for owner in range(owners):
        start, stop = (min(columns, chunk * (owner + i)) for i in (0, 1))
        cuts += [start + c for c in even_cuts(stop - start, per_owner)[1:]]
    return cuts


def attention_part(query_heads: int, kv_heads: int, head_width: int, count: int) -> Part:
    """Attention in `count` buckets of key/value heads, each with the query heads that attend to it.

    Columns of a bucket: q, k, v, o. `count` divides kv_heads.
    """
    q_width, kv_width = query_heads * head_width, kv_heads * head_width
    matrices = (
        Matrix("q", 1, q_width), Matrix("k", 1, kv_width), Matrix("v", 1, kv_width), Matrix("o", 0, q_width)
    )  # fmt: skip
    cuts = zip(pairwise(even_cuts(q_width, count)), pairwise(even_cuts(kv_width, count)), strict=True)
    buckets = tuple((Span(0, *q), Span(1, *kv), Span(2, *kv), Span(3, *q)) for q, kv in cuts)
    return Part("attention", matrices, buckets)


def mlp_part(ffn: int, cuts: list[int]) -> Part:
    """A gated MLP in buckets of FFN columns. Columns of a bucket: gate, up, down."""
    matrices = (Matrix("gate", 1, ffn), Matrix("up", 1, ffn), Matrix("down", 0, ffn))
    return Part("mlp", matrices, tuple(tuple(Span(m, *cut) for m in range(3)) for cut in pairwise(cuts)))


def head_part(vocabulary: int, count: int) -> Part:
    """The output head in `count` buckets of vocabulary rows."""
    cuts = even_cuts(vocabulary, count)
    return Part("head", (Matrix("head", 1, vocabulary),), tuple((Span(0, *cut),) for cut in pairwise(cuts)))
