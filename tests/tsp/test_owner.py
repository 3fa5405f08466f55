"""Owners' buckets arrive and their gradients get home, however unevenly they are owned."""

import pytest
import torch
import torch.distributed as dist
from distributed import run_distributed
from transports import assert_travels

from megatsp.comm import Comm
from megatsp.tsp.buckets import attention_part, even_cuts, mlp_part, owner_cuts
from megatsp.tsp.owner import Broadcast, Ring


def rank_mlp(kind: type, dtype: torch.dtype) -> None:
    """9 columns over 4 owners are 3, 3, 3 and none; 5 are 2, 2, 1 and none; 13 leave a short last owner."""
    comm = Comm(dist.group.WORLD)
    for columns in (9, 5, 13, 16):
        for count in (1, 2, 3):
            cuts = owner_cuts(columns, comm.size, count) if kind is Ring else even_cuts(columns, count)
            assert_travels(kind(mlp_part(columns, cuts), comm, dtype), "owner", comm, dtype, torch.float32)
    assert (sum(comm.traffic.elements.values()) == 0) == (comm.size == 1)


def rank_attention() -> None:
    """Heads of width 6 against owners' borders at a quarter of the columns: these straddle heads."""
    comm = Comm(dist.group.WORLD)
    for query_heads, kv_heads in ((3, 3), (6, 3), (5, 1)):
        for count in {1, kv_heads}:
            part = attention_part(query_heads, kv_heads, 6, count)
            assert_travels(Broadcast(part, comm, torch.float32), "owner", comm, torch.float32, torch.float32)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("kind", [Broadcast, Ring])
def test_buckets_arrive_and_gradients_land(kind, size):
    run_distributed(rank_mlp, size, kind, torch.float32)


@pytest.mark.parametrize("kind", [Broadcast, Ring])
def test_weights_travel_in_the_compute_dtype(kind):
    run_distributed(rank_mlp, 2, kind, torch.bfloat16)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_attention_heads(size):
    run_distributed(rank_attention, size)


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
