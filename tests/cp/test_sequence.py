"""Attention over a sharded sequence equals the plain text on the whole one, forward and backward."""

import pytest
import torch
import torch.distributed as dist
from distributed import run_distributed
from megatsp_kernels.attention import sdpa
from megatsp_kernels.attention.reference import attention
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from megatsp.comm import Comm, Traffic
from megatsp.cp.sequence import SequenceAttention, sequence_attention
from megatsp.tsp.partition import take_local

BATCH, WIDTH, CHUNK = 2, 8, 5  # chunks of odd length
SCALE = 0.3
HEADS = [(4, 4), (8, 4), (4, 2), (4, 1)]  # query and key/value heads: MHA, GQA, MQA
EXCHANGES = ["allgather", "ring", "ulysses", "hierarchical"]
# Ranks of the cp and tsp axes, by size; only `hierarchical` tells those of a size apart.
MESHES = {1: [(1, 1)], 2: [(1, 2), (2, 1)], 4: [(1, 4), (4, 1), (2, 2)], 8: [(2, 4), (4, 2)]}

Results = dict[str, Tensor]
Job = tuple[str, tuple[int, int], tuple[int, int]]  # exchange, mesh, heads


def jobs(size: int) -> list[Job]:
    return [
        (exchange, mesh, heads)
        for exchange in EXCHANGES
        for mesh in (MESHES[size] if exchange == "hierarchical" else MESHES[size][:1])
        for heads in HEADS
        if exchange != "ulysses" or heads[1] % size == 0
    ]


def inputs(heads: tuple[int, int], size: int) -> tuple[Tensor, ...]:
    """q, k, v and the gradient of the output, whole, fp32 [B, heads, T, d]."""
    generator = torch.Generator().manual_seed(sum(heads))
    shapes = [(BATCH, n, 2 * size * CHUNK, WIDTH) for n in (heads[0], heads[1], heads[1], heads[0])]
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def plain(heads: tuple[int, int], size: int, dtype: torch.dtype) -> Results:
    """The reference on the inputs as `dtype` rounds them, differentiated by autograd; fp32."""
    q, k, v, dout = (t.to(dtype).float() for t in inputs(heads, size))
    for t in (q, k, v):
        t.requires_grad_()
    out, _ = attention(q, k, v, True, SCALE)
    out.backward(dout)
    return {"out": out.detach(), "dq": q.grad, "dk": k.grad, "dv": v.grad}


def run(sequence: SequenceAttention, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> Results:
    out, lse = sequence.forward(q, k, v)
    dq, kv_gradients = sequence.backward(dout, q, k, v, out, lse)
    dk, dv = kv_gradients()
    assert out.dtype == q.dtype
    return {"out": out, "dq": dq, "dk": dk, "dv": dv}


def comms(mesh_sizes: tuple[int, int]) -> tuple[Comm, Comm, Comm]:
    """sequence, outer and inner."""
    mesh = init_device_mesh("cpu", mesh_sizes)
    traffic = Traffic()
    return tuple(Comm(group, traffic) for group in (dist.group.WORLD, mesh.get_group(0), mesh.get_group(1)))


def rank_attention(size: int, dtype: torch.dtype) -> dict[Job, tuple[Results, dict[str, int]]]:
    """On a rank, by job: its share of the results, and the bytes that moved."""
    found, of_mesh = {}, {mesh: comms(mesh) for mesh in MESHES[size]}
    for exchange, mesh, heads in jobs(size):
        sequence, outer, inner = of_mesh[mesh]
        local = [take_local(t, sequence.rank, size, dim=2).to(dtype) for t in inputs(heads, size)]
        # As tsp/attention.py has them: [B, T/S, heads, d] in memory.
        q, k, v, dout = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in local)
        sequence.traffic.bytes.clear()
        results = run(sequence_attention(exchange, sequence, outer, inner, SCALE, sdpa), q, k, v, dout)
        expected_dtype = dtype if size == 1 else torch.float32
        assert {results[key].dtype for key in ("dq", "dk", "dv")} == {expected_dtype}
        found[exchange, mesh, heads] = results, dict(sequence.traffic.bytes)
    return found


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.float() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("size", MESHES)
def test_fp32(size):
    for rank, found in enumerate(run_distributed(rank_attention, size, size, torch.float32)):
        for job, (results, _) in found.items():
            for key, whole in plain(job[2], size, torch.float32).items():
                expected = take_local(whole, rank, size, dim=2)
                assert relative_error(results[key], expected) < 1e-6, (job, key)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_bf16_error_is_at_most_twice_the_undivided_one(size):
    """The undivided one: the same kernel in bf16 on the whole sequence, in one block."""
    undivided = {heads: run(alone(), *(t.bfloat16() for t in inputs(heads, size))) for heads in HEADS}
    for rank, found in enumerate(run_distributed(rank_attention, size, size, torch.bfloat16)):
        for job, (results, _) in found.items():
            for key, whole in plain(job[2], size, torch.bfloat16).items():
                expected, once = (take_local(t, rank, size, dim=2) for t in (whole, undivided[job[2]][key]))
                bound = 2 * relative_error(once, expected) + 1e-6
                assert relative_error(results[key], expected) <= bound, (job, key)


def alone() -> SequenceAttention:
    return sequence_attention("allgather", Comm(None), Comm(None), Comm(None), SCALE, sdpa)


def moved_bytes(exchange: str, heads: tuple[int, int], size: int, element_size: int) -> dict[str, int]:
    """What every rank receives, gradients excepted, which it sends: the formulas of each module."""
    query, kv = (n * BATCH * 2 * CHUNK * WIDTH for n in heads)  # of one rank
    if size == 1:
        return {}
    if exchange == "ulysses":
        forward, backward = 2 * query + 2 * kv, 4 * query + 4 * kv
        return {
            "ulysses/forward": element_size * forward * (size - 1) // size,
            "ulysses/backward": element_size * backward * (size - 1) // size,
        }
    shards = 2 * kv * (size - 1)
    return {"kv/forward": element_size * shards, "kv/backward": element_size * shards,
            "kv/gradients": 4 * shards}  # fmt: skip


@pytest.mark.parametrize(("size", "dtype"), [(1, torch.float32), (4, torch.bfloat16), (8, torch.float32)])
def test_bytes(size, dtype):
    for found in run_distributed(rank_attention, size, size, dtype):
        assert found.keys() == set(jobs(size))
        for (exchange, mesh, heads), (_, moved) in found.items():
            assert moved == moved_bytes(exchange, heads, size, dtype.itemsize), (exchange, mesh, heads)


@pytest.mark.parametrize(("mesh", "level"), [((1, 4), "allgather"), ((4, 1), "ring")])
def test_a_hierarchy_of_one_axis_is_its_other_level(mesh, level):
    for found in run_distributed(rank_attention, 4, 4, torch.float32):
        for heads in HEADS:
            results, _ = found["hierarchical", mesh, heads]
            for key, expected in found[level, MESHES[4][0], heads][0].items():
                assert torch.equal(results[key], expected), key


def rank_outer_elements(mesh_sizes: tuple[int, int]) -> dict[str, int]:
    """On a rank: what one head's forward and backward moved over the outer axis alone."""
    mesh = init_device_mesh("cpu", mesh_sizes)
    outer, inner = (Comm(mesh.get_group(dim), Traffic()) for dim in (0, 1))
    q, k, v, dout = torch.zeros(4, 1, 1, 2 * CHUNK, WIDTH)
    run(sequence_attention("hierarchical", Comm(dist.group.WORLD), outer, inner, SCALE, sdpa), q, k, v, dout)
    return dict(outer.traffic.elements)


@pytest.mark.parametrize("mesh", [(2, 2), (4, 2)])
def test_hierarchical_moves_only_one_shard_a_hop_over_the_outer_axis(mesh):
    shards = (mesh[0] - 1) * 2 * 2 * CHUNK * WIDTH
    for elements in run_distributed(rank_outer_elements, mesh[0] * mesh[1], mesh):
        assert elements == {"kv/forward": shards, "kv/backward": shards, "kv/gradients": shards}


def rank_visited(mesh: tuple[int, int], name: str) -> int:
    """On a rank: score elements visited, its own block's included, one query head."""
    sequence = sequence_attention(name, *comms(mesh), SCALE, sdpa)
    length = 2 * CHUNK
    visited = length * (length + 1) // 2
    for arrival in sequence._exchange(torch.zeros(2, 1, 1, length, WIDTH), "kv/forward").arrivals():
        keys = arrival.kv.shape[0] * length
        for _, rows, columns in sequence._visits(arrival, None):
            visited += len(range(length)[rows]) * len(range(keys)[columns])
    return visited


@pytest.mark.parametrize("mesh", [(1, 2), (1, 4), (2, 2)])
@pytest.mark.parametrize("exchange", ["allgather", "ring", "hierarchical"])
def test_only_what_is_seen_is_visited_and_all_ranks_do_the_same(mesh, exchange):
    found = run_distributed(rank_visited, mesh[0] * mesh[1], mesh, exchange)
    assert len(set(found)) == 1
    tokens = 2 * len(found) * CHUNK
    assert sum(found) == tokens * (tokens + 1) // 2
