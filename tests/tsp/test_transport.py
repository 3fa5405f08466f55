"""Every transport delivers the logical bucket and takes its gradient home, however unevenly it is owned."""

from collections import Counter

import pytest
import torch
import torch.distributed as dist
from distributed import run_distributed
from torch import Tensor

from megatsp.comm import Comm
from megatsp.tsp.buckets import Matrix, attention_part, even_cuts, h_major, mlp_part, owner_cuts, width
from megatsp.tsp.transport import Broadcast, Gather, Ring, Transport

H = 8
LAYOUTS = {Gather: "hidden", Broadcast: "owner", Ring: "owner"}


def logical(matrix: Matrix, index: int) -> Tensor:
    """The h-major matrix [h, n], every element its own."""
    return 1000.0 * index + torch.arange(float(H * matrix.columns)).view(H, -1)


def cut(whole: Tensor, matrix: Matrix, layout: str, rank: int, size: int) -> Tensor:
    """A rank's shard of an h-major matrix, as the parameter has it; the last owners may have no columns."""
    chunks = whole.chunk(size, 0 if layout == "hidden" else 1)
    mine = chunks[rank] if rank < len(chunks) else whole[:, :0]
    return h_major(mine, matrix).contiguous()


def gradient(matrix: Matrix, index: int, rank: int) -> Tensor:
    """What one rank contributes to a matrix's gradient: small integers, so that sums are exact."""
    generator = torch.Generator().manual_seed(10 * rank + index)
    return torch.randint(-9, 10, (H, matrix.columns), generator=generator).float()


def assert_travels(transport: Transport, layout: str) -> None:
    part, comm = transport.part, transport.comm  # type: ignore[attr-defined]
    wholes = [logical(m, i) for i, m in enumerate(part.matrices)]
    shards = [cut(w, m, layout, comm.rank, comm.size) for w, m in zip(wholes, part.matrices, strict=True)]
    mine = [gradient(m, i, comm.rank) for i, m in enumerate(part.matrices)]
    collected, visited, previous = transport.gradients(shards), Counter(), None
    for step in range(transport.steps):
        index = transport.bucket(step)
        bucket = part.buckets[index]
        visited[index] += 1
        previous = transport.post(step, shards, previous).wait()
        expected = torch.cat([wholes[s.matrix][:, s.start : s.stop] for s in bucket], 1)
        assert previous.shape == (H, width(bucket))
        assert torch.equal(previous, expected.to(previous.dtype)), f"bucket {index} of {part.label}"
        buffer = collected.buffer(step)
        assert (buffer.shape, buffer.dtype) == ((H, width(bucket)), torch.float32)
        buffer.copy_(torch.cat([mine[s.matrix][:, s.start : s.stop] for s in bucket], 1))
        collected.send(step, buffer)
    assert visited == dict.fromkeys(range(len(part.buckets)), 1)
    for i, (landed, shard, matrix) in enumerate(zip(collected.finish(), shards, part.matrices, strict=True)):
        total = sum(gradient(matrix, i, rank) for rank in range(comm.size))
        assert (landed.shape, landed.dtype) == (shard.shape, torch.float32)
        assert torch.equal(landed, cut(total, matrix, layout, comm.rank, comm.size))


def mlp_cuts(kind: type, columns: int, size: int, count: int) -> list[int]:
    return owner_cuts(columns, size, count) if kind is Ring else even_cuts(columns, count)


def rank_mlp(kind: type, dtype: torch.dtype) -> None:
    """9 columns over 4 owners are 3, 3, 3 and none; 5 are 2, 2, 1 and none; 13 leave a short last owner."""
    comm = Comm(dist.group.WORLD)
    for columns in (9, 5, 13, 16):
        for count in (1, 2, 3):
            part = mlp_part(columns, mlp_cuts(kind, columns, comm.size, count))
            assert_travels(kind(part, comm, dtype), LAYOUTS[kind])
    sent = sum(comm.traffic.elements.values())
    assert (sent == 0) == (comm.size == 1)


def rank_attention(kind: type) -> None:
    """Heads of width 6 against owners' borders at a quarter of the columns: these straddle heads."""
    comm = Comm(dist.group.WORLD)
    for query_heads, kv_heads in ((3, 3), (6, 3), (5, 1)):
        for count in {1, kv_heads}:
            part = attention_part(query_heads, kv_heads, 6, count)
            assert_travels(kind(part, comm, torch.float32), LAYOUTS[kind])


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("kind", [Gather, Broadcast, Ring])
def test_buckets_arrive_and_gradients_land(kind, size):
    run_distributed(rank_mlp, size, kind, torch.float32)


@pytest.mark.parametrize("kind", [Gather, Broadcast, Ring])
def test_weights_travel_in_the_compute_dtype(kind):
    run_distributed(rank_mlp, 2, kind, torch.bfloat16)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("kind", [Gather, Broadcast])
def test_attention_heads(kind, size):
    run_distributed(rank_attention, size, kind)


def test_pieces_are_cut_at_owners_and_neighbours_are_merged():
    class FourRanks:
        size, rank = 4, 0

    broadcast = Broadcast(attention_part(3, 3, 6, 3), FourRanks(), torch.float32)  # owners hold 5, 5, 5, 3
    pieces = [(owner, start, stop) for owner, start, stop, _ in broadcast.pieces(0)]
    # q, k, v and o of head 0, columns 0 to 6, are owner 0's but for the last one.
    assert pieces == [(0, 0, 5), (1, 5, 6), (0, 6, 11), (1, 11, 12), (0, 12, 17), (1, 17, 18), (0, 18, 23),
                      (1, 23, 24)]  # fmt: skip
    whole = Broadcast(mlp_part(16, even_cuts(16, 4)), FourRanks(), torch.float32)
    for step in range(4):  # buckets and owners coincide: one broadcast of gate, up and down
        ((owner, start, stop, spans),) = whole.pieces(step)
        assert (owner, start, stop, len(spans)) == (step, 0, 12, 3)


def test_a_ring_starts_with_ones_own_and_then_has_its_predecessors():
    class Third:
        size, rank = 4, 2

    part = mlp_part(9, owner_cuts(9, 4, 2))
    ring = Ring(part, Third(), torch.float32)
    assert [ring.bucket(step) for step in range(8)] == [4, 2, 0, 6, 5, 3, 1, 7]
