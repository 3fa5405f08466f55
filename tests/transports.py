"""What every transport must do: deliver the logical buckets, and take their gradients home."""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from megatsp.comm import Comm
from megatsp.tsp.buckets import Columns, Matrix, h_major, width
from megatsp.tsp.transport import Transport

H = 8


def logical(matrix: Matrix, index: int) -> Tensor:
    """The h-major matrix [h, n], every element its own."""
    return 1000.0 * index + torch.arange(float(H * matrix.columns)).view(H, -1)


def cut(whole: Tensor, matrix: Matrix, layout: str, comm: Comm) -> Tensor:
    """A rank's shard of an h-major matrix, as the parameter has it; the last owners may have no columns."""
    chunks = whole.chunk(comm.size, 0 if layout == "hidden" else 1)
    mine = chunks[comm.rank] if comm.rank < len(chunks) else whole[:, :0]
    return h_major(mine, matrix).contiguous()


def gradient(matrix: Matrix, index: int, rank: int) -> Tensor:
    """What one rank contributes to a matrix's gradient: small integers, so that sums are exact."""
    generator = torch.Generator().manual_seed(10 * rank + index)
    return torch.randint(-9, 10, (H, matrix.columns), generator=generator).float()


def shards_of(transport: Transport, layout: str, comm: Comm) -> list[Tensor]:
    matrices = transport.part.matrices
    return [cut(logical(m, i), m, layout, comm) for i, m in enumerate(matrices)]


def columns_of(wholes: Sequence[Tensor], transport: Transport, step: int) -> list[Tensor]:
    """The columns of this step's bucket in h-major matrices, one tensor a span."""
    return [wholes[s.matrix][:, s.start : s.stop] for s in transport.part.buckets[transport.bucket(step)]]


def assert_columns(columns: Columns, expected: Sequence[Tensor], dtype: torch.dtype) -> None:
    """The pieces, and where they lie side by side the whole, are `expected` in `dtype`."""
    for piece, wanted in zip(columns.pieces, expected, strict=True):
        assert piece.dtype == dtype and torch.equal(piece, wanted.to(dtype))
    if columns.whole is not None:
        assert torch.equal(columns.whole, torch.cat(list(expected), 1).to(dtype))


def assert_travels(
    transport: Transport, layout: str, comm: Comm, dtype: torch.dtype, gradient_dtype: torch.dtype
) -> None:
    """Every bucket arrives once, in `dtype`, and the sum of the ranks' gradients lands in the shards."""
    part, shards = transport.part, shards_of(transport, layout, comm)
    wholes = [logical(m, i) for i, m in enumerate(part.matrices)]
    mine = [gradient(m, i, comm.rank) for i, m in enumerate(part.matrices)]
    collected, visited, previous = transport.gradients(shards), Counter(), None
    for step in range(transport.steps):
        visited[transport.bucket(step)] += 1
        previous = transport.post(step, shards, previous).wait()
        columns = transport.columns(step, shards, previous)
        assert_columns(columns, columns_of(wholes, transport, step), dtype)
        buffer = collected.buffer(step)
        assert sum(p.shape[1] for p in buffer.pieces) == width(part.buckets[transport.bucket(step)])
        for piece, value in zip(buffer.pieces, columns_of(mine, transport, step), strict=True):
            assert piece.dtype == gradient_dtype
            piece.copy_(value)
        collected.send(step, buffer)
    assert visited == dict.fromkeys(range(len(part.buckets)), 1)
    for i, (landed, shard, matrix) in enumerate(zip(collected.finish(), shards, part.matrices, strict=True)):
        total = sum(gradient(matrix, i, rank) for rank in range(comm.size))
        assert (landed.shape, landed.dtype) == (shard.shape, gradient_dtype)
        assert torch.equal(landed, cut(total, matrix, layout, comm))
