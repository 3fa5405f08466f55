"""A gathered bucket is the logical one; a resident one is where the weights are, and copies nothing."""

import pytest
import torch
import torch.distributed as dist
from distributed import run_distributed
from torch import Tensor
from transports import H, assert_columns, assert_travels, columns_of, logical, shards_of

from megatsp.comm import Comm
from megatsp.tsp.buckets import Columns, Part, attention_part, even_cuts, head_part, mlp_part
from megatsp.tsp.transport import Gather, Resident

ALONE = Comm(None)
PARTS = [
    mlp_part(13, even_cuts(13, 3)),
    mlp_part(9, even_cuts(9, 1)),
    attention_part(6, 3, 6, 3),
    head_part(11, 4),
]


def rank_mlp(dtype: torch.dtype) -> None:
    comm = Comm(dist.group.WORLD)
    for columns in (9, 5, 13, 16):
        for count in (1, 2, 3):
            gather = Gather(mlp_part(columns, even_cuts(columns, count)), comm, dtype)
            assert_travels(gather, "hidden", comm, dtype, torch.float32)
    assert (sum(comm.traffic.elements.values()) == 0) == (comm.size == 1)


def rank_attention() -> None:
    comm = Comm(dist.group.WORLD)
    for query_heads, kv_heads in ((3, 3), (6, 3), (5, 1)):
        for count in {1, kv_heads}:
            part = attention_part(query_heads, kv_heads, 6, count)
            assert_travels(Gather(part, comm, torch.float32), "hidden", comm, torch.float32, torch.float32)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_gathered_buckets_arrive_and_gradients_land(size):
    run_distributed(rank_mlp, size, torch.float32)


def test_gathered_weights_travel_in_the_compute_dtype():
    run_distributed(rank_mlp, 2, torch.bfloat16)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_gathered_attention_heads(size):
    run_distributed(rank_attention, size)


def in_memory_of(tensor: Tensor, of: Tensor) -> bool:
    """Whether every element of `tensor` is one of the elements of `of`."""
    start, step = of.data_ptr(), of.element_size()
    first = tensor.data_ptr()
    last = first + step * sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.dtype == of.dtype and start <= first and last < start + of.numel() * step


def arrived(resident: Resident, step: int, weights: list[Tensor]) -> Columns:
    return resident.columns(step, weights, resident.post(step, weights, None).wait())


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resident_buckets_are_the_logical_ones(part: Part, dtype: torch.dtype):
    resident = Resident(part, dtype)
    assert resident.steps == len(part.buckets)
    assert_travels(resident, "hidden", ALONE, dtype, torch.float32)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resident_bucket_is_in_the_weights_memory(part: Part, dtype: torch.dtype):
    resident = Resident(part, dtype)
    weights = [w.to(dtype) for w in shards_of(resident, "hidden", ALONE)]
    for step in range(resident.steps):
        columns = arrived(resident, step, weights)
        assert columns.whole is None
        for piece, span in zip(columns.pieces, part.buckets[step], strict=True):
            assert in_memory_of(piece, weights[span.matrix])


@pytest.mark.parametrize("part", PARTS)
def test_a_resident_bucket_of_another_dtype_is_cast_and_nothing_else(part: Part):
    resident = Resident(part, torch.bfloat16)
    weights = shards_of(resident, "hidden", ALONE)
    wholes = [logical(m, i) for i, m in enumerate(part.matrices)]
    for step in range(resident.steps):
        columns = arrived(resident, step, weights)
        assert_columns(columns, columns_of(wholes, resident, step), torch.bfloat16)
        for piece in columns.pieces:  # as large as the bucket, no more
            assert piece.untyped_storage().nbytes() == 2 * piece.numel()


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resident_gradients_are_written_where_they_stay(part: Part, dtype: torch.dtype):
    resident = Resident(part, torch.bfloat16)
    weights = [w.to(dtype) for w in shards_of(resident, "hidden", ALONE)]
    gradients = resident.gradients(weights)
    for step in range(resident.steps):
        buffer = gradients.buffer(step)
        for piece in buffer.pieces:
            piece.fill_(step + 1.0)
        gradients.send(step, buffer)
    whole = gradients.finish()
    for gradient, weight in zip(whole, weights, strict=True):
        assert (gradient.shape, gradient.dtype) == (weight.shape, dtype)  # the weights' dtype, not fp32
        assert not in_memory_of(gradient, weight)
    for step in range(resident.steps):
        for piece, span in zip(gradients.buffer(step).pieces, part.buckets[step], strict=True):
            assert in_memory_of(piece, whole[span.matrix])
            assert torch.equal(piece, torch.full((H, span.width), step + 1.0, dtype=dtype))
