"""Attention over a sharded sequence equals the plain text on the whole one, forward and backward."""

import pytest
import torch
import torch.distributed as dist
from distributed import run_distributed
from megatsp_kernels.attention.reference import attention
from torch import Tensor

from megatsp.comm import Comm
from megatsp.tsp.attend import EXCHANGES, SequenceAttention
from megatsp.tsp.partition import take_local

BATCH, WIDTH, CHUNK = 2, 8, 5  # chunks of odd length
SCALE = 0.3
HEADS = [(4, 4), (4, 2), (4, 1)]  # query and key/value heads: MHA, GQA, MQA

Results = dict[str, Tensor]


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
    out, lse = attention(q, k, v, True, SCALE)
    out.backward(dout)
    return {"out": out.detach(), "lse": lse.detach(), "dq": q.grad, "dk": k.grad, "dv": v.grad}


def rank_attention(dtype: torch.dtype) -> dict[tuple[str, tuple[int, int]], Results]:
    """On a rank: its share of everything, by exchange and heads."""
    comm, found = Comm(dist.group.WORLD), {}
    for name in EXCHANGES:
        for heads in HEADS:
            local = [take_local(t, comm.rank, comm.size, dim=2).to(dtype) for t in inputs(heads, comm.size)]
            # As attention.py has them: [B, T/D, heads, d] in memory.
            q, k, v, dout = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in local)
            sequence = SequenceAttention(comm, name, SCALE)
            out, lse = sequence.forward(q, k, v)
            dq, kv_gradients = sequence.backward(dout, q, k, v, out, lse)
            dk, dv = kv_gradients()
            assert out.dtype == dtype
            assert {t.dtype for t in (lse, dq, dk, dv)} == {torch.float32}
            found[name, heads] = {"out": out.float(), "lse": lse, "dq": dq, "dk": dk, "dv": dv}
    assert (comm.size == 1) == (not comm.traffic.elements)
    return found


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_fp32(size):
    for rank, found in enumerate(run_distributed(rank_attention, size, torch.float32)):
        for (exchange, heads), results in found.items():
            for key, whole in plain(heads, size, torch.float32).items():
                expected = take_local(whole, rank, size, dim=2)
                assert relative_error(results[key], expected) < 1e-6, (exchange, heads, key)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_bf16_error_is_at_most_twice_the_undivided_one(size):
    """The undivided one: the same kernel in bf16 on the whole sequence, in one block."""
    (undivided,) = run_distributed(rank_undivided, 1, size)
    for rank, found in enumerate(run_distributed(rank_attention, size, torch.bfloat16)):
        for (exchange, heads), results in found.items():
            for key, whole in plain(heads, size, torch.bfloat16).items():
                expected, once = (take_local(t, rank, size, dim=2) for t in (whole, undivided[heads][key]))
                bound = 2 * relative_error(once, expected) + 1e-6
                assert relative_error(results[key], expected) <= bound, (exchange, heads, key)


def rank_undivided(size: int) -> dict[tuple[int, int], Results]:
    found = {}
    for heads in HEADS:
        q, k, v, dout = (t.bfloat16() for t in inputs(heads, size))
        sequence = SequenceAttention(Comm(None), "allgather", SCALE)
        out, lse = sequence.forward(q, k, v)
        dq, kv_gradients = sequence.backward(dout, q, k, v, out, lse)
        dk, dv = kv_gradients()
        found[heads] = {"out": out.float(), "lse": lse, "dq": dq, "dk": dk, "dv": dv}
    return found


def rank_visits(name: str) -> tuple[int, int]:
    """On a rank: score elements visited in its own block and in the arrived ones."""
    comm = Comm(dist.group.WORLD)
    kv = torch.zeros(2, 1, 1, 2 * CHUNK, WIDTH)
    exchange = EXCHANGES[name](comm, kv, "kv/forward")
    length, visited = 2 * CHUNK, 0
    for arrived, visits in exchange.arrivals():
        for rows, columns in visits:
            visited += len(range(length)[rows]) * len(range(arrived.shape[-2])[columns])
    return length * (length + 1) // 2, visited


@pytest.mark.parametrize("exchange", list(EXCHANGES))
@pytest.mark.parametrize("size", [2, 4])
def test_only_what_is_seen_is_visited_and_all_ranks_do_the_same(exchange, size):
    found = run_distributed(rank_visits, size, exchange)
    assert len({sum(own_and_arrived) for own_and_arrived in found}) == 1
    tokens = 2 * size * CHUNK
    assert sum(map(sum, found)) == tokens * (tokens + 1) // 2
