"""Attention in steps equals the plain text, forward and every gradient, whatever arrives when and where.

D ranks are simulated in one process: rank r's queries meet every rank's keys, in the order of the ring.
"""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from checks import DEVICE, DTYPES, Poisoned, assert_near, randn
from megatsp_kernels.attention import (
    AttentionState,
    attention,
    attention_backward_step,
    attention_delta,
    attention_step,
    bench,
)
from megatsp_kernels.attention.reference import positions, ring_attention
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.runtime import interpreter

SCALE = 0.3


@pytest.fixture(autouse=True)
def _as_compiled(monkeypatch):
    """The interpreter checks every integer for overflow, which compiled kernels do not: half of its time."""
    builder = interpreter.interpreter_builder
    monkeypatch.setattr(builder, "options", replace(builder.options, sanitize_overflow=False))


Step = tuple[Tensor, Tensor, Tensor]  # k, v [S, B, K, t, d], and where their chunks begin


def ints(*numbers: int) -> Tensor:
    return torch.tensor(numbers, device=DEVICE)


def in_steps(
    q: Tensor, dout: Tensor, q_starts: Tensor, steps: Sequence[Step], q_first: Tensor | None = None
) -> tuple[Tensor, ...]:
    """out, lse, dq, and the dk and dv of each step."""
    state = None
    for k, v, k_starts in steps[:-1]:
        state = attention_step(q, k, v, q_starts, k_starts, SCALE, state, False, q_first)
    k, v, k_starts = steps[-1]
    out, lse = attention_step(q, k, v, q_starts, k_starts, SCALE, state, q_first=q_first)
    delta = attention_delta(out, dout)
    dq, of_keys = None, []
    for k, v, k_starts in steps:
        dq, dk, dv = attention_backward_step(
            dout, q, k, v, lse, delta, q_starts, k_starts, SCALE, dq, q_first
        )
        of_keys += [dk, dv]
    assert dq is not None
    return out, lse, dq, *of_keys


def at_once(
    q: Tensor, dout: Tensor, q_starts: Tensor, steps: Sequence[Step], q_first: Tensor | None = None
) -> tuple[Tensor, ...]:
    """The same by the reference, in the dtype of the inputs."""
    q, *kv = (t.detach().requires_grad_() for t in (q, *(t for k, v, _ in steps for t in (k, v))))
    starts = torch.cat([starts for *_, starts in steps])
    out, lse = ring_attention(q, torch.cat(kv[::2]), torch.cat(kv[1::2]), q_starts, starts, SCALE, q_first)
    return out.detach(), lse.detach(), *torch.autograd.grad(out, (q, *kv), dout)


def assert_steps_near(
    ours: Sequence[Tensor],
    q: Tensor,
    dout: Tensor,
    q_starts: Tensor,
    steps: Sequence[Step],
    q_first: Tensor | None = None,
) -> None:
    """Ours: out, lse (fp32) and gradients (fp32), which are compared in the dtype of the inputs."""
    plain = at_once(q, dout, q_starts, steps, q_first)
    wide = [(k.double(), v.double(), starts) for k, v, starts in steps]
    exact = at_once(q.double(), dout.double(), q_starts, wide, q_first)
    assert [t.dtype for t in ours[1:]] == [torch.float32] * (len(ours) - 1)
    seen = exact[1] > float("-inf")
    assert torch.equal(ours[1] > float("-inf"), seen)
    assert not ours[0][~seen].any() and not ours[2][~seen].any()
    torch.testing.assert_close(ours[1].double(), exact[1], rtol=1e-5, atol=1e-5)
    rounded = [t.to(q.dtype) for t in ours]
    assert_near([rounded[0], *rounded[2:]], [plain[0], *plain[2:]], [exact[0], *exact[2:]])


def inputs(
    heads: int, kv_heads: int, queries: int, keys: int, d: int, dtype: torch.dtype, *, batch=1, shards=1
) -> tuple[Tensor, ...]:
    """q, k, v, dout."""
    k = (shards, batch, kv_heads, keys, d)
    q = (batch, heads, queries, d)
    shapes = q, k, k, q
    return tuple(randn(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes))


LOW = DTYPES[1]
# batch, query heads, key/value heads, tokens, head width, dtype
CAUSAL = [
    (2, 2, 1, 19, 24, torch.float32),
    (1, 1, 1, 37, 16, LOW),
    (1, 4, 1, 7, 16, torch.float32),
    (1, 9, 9, 2, 8, torch.float32),  # more heads than go out at a time
    (1, 2, 2, 17, 64, LOW),
    (1, 1, 1, 18, 96, torch.float32),
    (1, 1, 1, 17, 128, torch.float32),
    (1, 1, 1, 17, 256, torch.float32),
]


@pytest.mark.parametrize("shape", CAUSAL)
def test_one_causal_step_equals_the_reference(shape):
    batch, heads, kv_heads, tokens, d, dtype = shape
    memory = Poisoned()
    q, k, v, dout = (memory.of(t) for t in inputs(heads, kv_heads, tokens, tokens, d, dtype, batch=batch))
    steps = [(k, v, ints(0))]
    ours = in_steps(q, dout, ints(0), steps)
    assert_steps_near(ours, q, dout, ints(0), steps)
    assert ours[0].transpose(1, 2).is_contiguous()
    memory.check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_autograd_gives_the_bits_of_the_step(dtype):
    q, k, v, dout = inputs(2, 1, 17, 17, 16, dtype)
    out, _, *gradients = in_steps(q, dout, ints(0), [(k, v, ints(0))])
    for t in (q, k, v):
        t.requires_grad_()
    again = attention(q, k[0], v[0], SCALE)
    assert torch.equal(again, out)
    for mine, step in zip(torch.autograd.grad(again, (q, k, v), dout), gradients, strict=True):
        assert torch.equal(mine, step.to(dtype))


def zigzag(rank: int, size: int, tokens: int) -> Tensor:
    """Where the two chunks of a rank that holds `tokens` begin."""
    return ints(rank * tokens // 2, (2 * size - 1 - rank) * tokens // 2)


def ring(size: int, tokens: int, documents: Sequence[int], dtype: torch.dtype) -> None:
    """Every rank's queries meet all keys by a ring; the gradients of a rank's keys go round with them."""
    starts = [zigzag(rank, size, tokens) for rank in range(size)]
    every = torch.cat(starts)
    q, k, v, dout = inputs(1, 1, size * tokens, tokens, 16, dtype, shards=size)
    begins = first_tokens(documents, size * tokens)
    dk, dv = (torch.zeros(t.shape, device=DEVICE) for t in (k, v))
    results = []
    for rank in range(size):
        mine = slice(rank * tokens, (rank + 1) * tokens)
        q_first = begins[of_rank(starts[rank], tokens)][None] if documents else None
        state = dq = None
        for hop in range(size):
            at = (rank - hop) % size
            state = attention_step(
                q[:, :, mine], k[at : at + 1], v[at : at + 1], starts[rank], starts[at], SCALE, state,
                hop == size - 1, q_first,
            )  # fmt: skip
        out, lse = state
        delta = attention_delta(out, dout[:, :, mine])
        for hop in range(size):
            at = (rank - hop) % size
            one = slice(at, at + 1)
            dq, _, _ = attention_backward_step(
                dout[:, :, mine], q[:, :, mine], k[one], v[one], lse, delta, starts[rank], starts[at], SCALE,
                dq, q_first, dk[one], dv[one],
            )  # fmt: skip
        results.append((out, lse, dq))
    out, lse, dq = (torch.cat(parts, 2) for parts in zip(*results, strict=True))
    whole_first = begins[of_rank(every, size * tokens)][None] if documents else None
    assert_steps_near([out, lse, dq, dk, dv], q, dout, every, [(k, v, every)], whole_first)


def of_rank(starts: Tensor, tokens: int) -> Tensor:
    """The positions of `tokens` that are chunks from `starts` on."""
    return positions(starts, tokens)


def first_tokens(boundaries: Sequence[int], tokens: int) -> Tensor:
    """For each position, where its document begins."""
    at = torch.arange(tokens, device=DEVICE)
    begins = torch.zeros(tokens, dtype=torch.int64, device=DEVICE)
    for boundary in boundaries:
        begins = torch.where(at >= boundary, boundary, begins)
    return begins


def test_a_ring_of_two_equals_the_reference():
    ring(2, 38, [], LOW)


def test_a_ring_of_four_equals_the_reference():
    ring(4, 18, [], torch.float32)


# Two ranks of 2 x 19 tokens, 76 in all: boundaries off the tiles, at a chunk's first token and its last, two
# in one tile, and documents that begin in the other rank's chunks (19..56) and end in the first's.
@pytest.mark.parametrize("documents", [[5, 7, 19, 37, 60], [25, 75]])
def test_documents_in_a_ring_equal_the_reference(documents):
    ring(2, 38, documents, torch.float32)


def test_documents_in_one_step_equal_the_reference():
    """Other ones in each sequence of the batch."""
    q, k, v, dout = inputs(1, 1, 35, 35, 16, LOW, batch=2)
    q_first = torch.stack([first_tokens([3, 16, 17, 33], 35), first_tokens([34], 35)])
    steps = [(k, v, ints(0))]
    assert_steps_near(in_steps(q, dout, ints(0), steps, q_first), q, dout, ints(0), steps, q_first)


@pytest.mark.parametrize("documents", [False, True])
def test_gathered_keys_come_after_ones_own(documents):
    """Shards as they landed, this rank's own absent (its chunks hold NaN), strided; added in place."""
    size, rank, tokens, d = 3, 1, 18, 16
    memory = Poisoned()
    q, k, v, dout = inputs(2, 1, tokens, tokens, d, torch.float32, shards=size)
    starts = [zigzag(r, size, tokens) for r in range(size)]
    q_first = first_tokens([11, 25, 41], size * tokens)[of_rank(starts[rank], tokens)][None]
    q_first = q_first if documents else None
    landed = memory.of(torch.stack([k, v], 1))  # [S, 2, B, K, t, d]
    landed[rank] = float("nan")
    absent = torch.cat([s if r != rank else torch.full_like(s, -1) for r, s in enumerate(starts)])
    by_tokens = memory.of(q.transpose(1, 2)).transpose(1, 2)
    own = k[rank : rank + 1], v[rank : rank + 1], starts[rank]
    state = attention_step(by_tokens, *own[:2], starts[rank], own[2], SCALE, last=False, q_first=q_first)
    fields = state.out, state.maximum, state.sum
    state = AttentionState(*(memory.of(t) for t in fields))
    gathered = landed[:, 0], landed[:, 1]
    out, lse = attention_step(by_tokens, *gathered, starts[rank], absent, SCALE, state, q_first=q_first)
    delta = attention_delta(out, dout)
    sums = memory.of(torch.ones(size, 2, *k.shape[1:], device=DEVICE))
    given = memory.of(torch.ones_like(q).transpose(1, 2)).transpose(1, 2)
    common = starts[rank], absent, SCALE
    dq, dk, dv = attention_backward_step(
        dout, by_tokens, *gathered, lse, delta, *common, given, q_first, sums[:, 0], sums[:, 1]
    )
    assert dq is given and dk.data_ptr() == sums.data_ptr()
    assert (sums[rank] == 1).all()
    dq, dk_own, dv_own = attention_backward_step(
        dout, q, *own[:2], lse, delta, starts[rank], own[2], SCALE, dq, q_first
    )
    others = [r for r in range(size) if r != rank]
    steps = [own, (k[others], v[others], torch.cat([starts[r] for r in others]))]
    ours = [out, lse, dq - 1, dk_own, dv_own, sums[others, 0] - 1, sums[others, 1] - 1]
    assert_steps_near(ours, q, dout, starts[rank], steps, q_first)
    fresh = attention_backward_step(dout, q, *gathered, lse, delta, *common, q_first=q_first)
    torch.testing.assert_close(fresh[1:], (dk - 1, dv - 1), rtol=1e-5, atol=1e-5)
    assert not fresh[1][rank].any() and not fresh[2][rank].any()  # exactly 0, where the keys are NaN
    memory.check()


def test_a_state_is_updated_in_place_and_within_its_tensors():
    memory = Poisoned()
    q, k, v, dout = inputs(1, 1, 19, 21, 24, torch.float32)
    steps = [(k * (1 + i), v + i, ints(21 * i)) for i in range(3)]  # ever greater maxima
    state = attention_step(q, *steps[0][:2], ints(40), steps[0][2], SCALE, last=False)
    mine = AttentionState(*(memory.of(t) for t in (state.out, state.maximum, state.sum)))
    assert attention_step(q, *steps[1][:2], ints(40), steps[1][2], SCALE, mine, last=False) is mine
    assert not torch.equal(mine.sum, state.sum)
    out, lse = attention_step(q, *steps[2][:2], ints(40), steps[2][2], SCALE, mine)
    ours = out, lse, *in_steps(q, dout, ints(40), steps)[2:]
    assert_steps_near(ours, q, dout, ints(40), steps)
    memory.check()


def test_rows_that_see_nothing_are_zero_and_have_no_gradient():
    """The first queries come before the first key; then a whole step shows none, alone, last or first."""
    q, k, v, dout = inputs(1, 1, 20, 18, 16, torch.float32)
    some, none = [(k, v, ints(7))], [(k, v, ints(20))]
    ours = in_steps(q, dout, ints(0), some)
    assert ours[1][..., :7].isneginf().all() and ours[1][..., 7:].isfinite().all()
    assert_steps_near(ours, q, dout, ints(0), some)
    assert_steps_near(in_steps(q, dout, ints(0), none), q, dout, ints(0), none)
    both = in_steps(q, dout, ints(0), some + none)
    assert_steps_near(both, q, dout, ints(0), some + none)
    first_nothing = in_steps(q, dout, ints(0), none + some)
    assert_steps_near(first_nothing, q, dout, ints(0), none + some)


def test_chunks_may_come_in_any_order():
    q, k, v, dout = inputs(1, 1, 33, 60, 16, torch.float32)
    q_starts, steps = ints(40, 3, 22), [(k, v, ints(45, 0, -1, 15))]
    ours = in_steps(q, dout, q_starts, steps)
    assert not ours[3][..., 30:45, :].any()
    assert_steps_near(ours, q, dout, q_starts, steps)


def test_every_alignment_of_queries_with_blocks_of_keys():
    """One chunk of queries from each position of two tiles on: where a block is whole, or lacks one."""
    q, k, v, dout = inputs(1, 1, 16 * 9, 26, 16, torch.float32)
    q_starts, steps = torch.arange(16, device=DEVICE), [(k, v, ints(0))]
    assert_steps_near(in_steps(q, dout, q_starts, steps), q, dout, q_starts, steps)


@pytest.mark.parametrize("documents", [False, True])
def test_what_no_query_of_a_block_sees_is_not_read(documents):
    """Weights of 0 times NaN would be NaN."""
    q, k, v, dout = inputs(1, 1, 32, 96, 16, torch.float32)
    q_first = torch.full((1, 32), 16, device=DEVICE) if documents else None
    unseen = torch.ones(96, dtype=torch.bool, device=DEVICE)
    unseen[16 if documents else 0 : 64] = False
    k[..., unseen, :], v[..., unseen, :] = float("nan"), float("nan")
    ours = in_steps(q, dout, ints(32), [(k, v, ints(0))], q_first)
    assert not any(t.isnan().any() for t in ours)
    assert not ours[3][..., unseen, :].any() and not ours[4][..., unseen, :].any()
    seen = k[..., ~unseen, :], v[..., ~unseen, :], ints(16 if documents else 0)
    expected = in_steps(q, dout, ints(32), [seen], q_first)
    torch.testing.assert_close(ours[:3], expected[:3], rtol=1e-5, atol=1e-5)


def test_queries_that_see_nothing_of_a_block_of_keys_are_not_read():
    q, k, v, dout = inputs(1, 1, 48, 16, 16, torch.float32)
    _, lse, *_ = in_steps(q, dout, ints(0), [(k, v, ints(0))])
    q[:, :, :32], dout[:, :, :32], lse[..., :32] = float("nan"), float("nan"), float("nan")
    delta = torch.zeros_like(lse)
    _, dk, dv = attention_backward_step(dout, q, k, v, lse, delta, ints(0), ints(32), SCALE)
    assert dk.isfinite().all() and dv.isfinite().all() and dk.any() and dv.any()


def test_the_same_inputs_give_the_same_bits():
    q, k, v, dout = inputs(2, 1, 17, 9, 16, torch.float32)
    steps = [(k, v, ints(0)), (k, v, ints(9))]
    first, second = (in_steps(q, dout, ints(1), steps) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("batch", "queries", "keys", "shards"), [(0, 4, 4, 1), (1, 0, 4, 1), (1, 4, 0, 1), (1, 4, 4, 0)]
)
def test_empty_inputs(batch, queries, keys, shards):
    q, k, v, dout = inputs(2, 1, queries, keys, 16, torch.float32, batch=batch, shards=shards)
    steps = [(k, v, torch.zeros(shards, dtype=torch.int64, device=DEVICE))]
    out, lse, *gradients = in_steps(q, dout, ints(0), steps)
    assert out.shape == q.shape and not out.any() and lse.isneginf().all()
    assert [g.shape for g in gradients] == [q.shape, k.shape, v.shape]
    assert not any(g.any() for g in gradients)


def test_a_gradient_without_strides_is_taken():
    q, k, v, _ = inputs(2, 1, 9, 9, 16, torch.float32)
    q.requires_grad_()
    ours = torch.autograd.grad(attention(q, k, v, SCALE).sum(), q)
    expected = torch.autograd.grad(ring_attention(q, k, v, ints(0), ints(0), SCALE)[0].sum(), q)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_it_works_on_fake_tensors():
    with FakeTensorMode():
        q, k = (
            torch.empty(2, 4, 6, 16, dtype=torch.bfloat16),
            torch.empty(3, 2, 2, 4, 16, dtype=torch.bfloat16),
        )
        q_starts, k_starts = torch.zeros(2, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
        state = attention_step(q, k, k, q_starts, k_starts, SCALE, last=False)
        out, lse = attention_step(q, k, k, q_starts, k_starts, SCALE, state)
        assert (out.shape, out.dtype, out.stride()) == (q.shape, q.dtype, (384, 16, 64, 1))
        delta = attention_delta(out, out)
        assert (lse.shape, lse.dtype) == (delta.shape, delta.dtype) == ((2, 4, 6), torch.float32)
        dq, dk, dv = attention_backward_step(out, q, k, k, lse, delta, q_starts, k_starts, SCALE)
        assert dq.shape == q.shape and dk.shape == dv.shape == k.shape and dk.dtype == torch.float32
        q.requires_grad_()
        (dq,) = torch.autograd.grad(attention(q, k, k, SCALE).sum(), q)
        assert (dq.shape, dq.dtype) == (q.shape, q.dtype)


def test_the_custom_ops_are_what_they_say():
    q, k, v, _ = inputs(2, 1, 5, 5, 16, torch.float32)
    ops = torch.ops.megatsp
    for t in (q, k, v):
        t.requires_grad_()
    torch.library.opcheck(ops.attention.default, (q, k, v, ints(0), ints(0), None, SCALE))
    q, k, v = q.detach(), k.detach(), v.detach()
    state = torch.zeros(1, 2, 5, 16), torch.zeros(1, 2, 5), torch.ones(1, 2, 5)
    state = tuple(t.to(DEVICE) for t in state)
    arguments = (q, k, v, ints(0), ints(0), None, SCALE, False, *state, None, None)
    torch.library.opcheck(ops.attention_step.default, arguments)
    rows = state[1], state[2]
    gradients = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    arguments = (q, q, k, v, *rows, ints(0), ints(0), None, SCALE, *gradients, True, True)
    torch.library.opcheck(ops.attention_backward_step.default, arguments)


def refused(message: str, **changes) -> None:
    q, k, v, _ = inputs(4, 2, 6, 6, 16, torch.float32)
    arguments = dict(q=q, k=k, v=v, q_starts=ints(0), k_starts=ints(0), scale=SCALE) | changes
    with pytest.raises(ValueError, match=message):
        attention_step(**arguments)
    zeros = torch.zeros(arguments["q"].shape[:-1], device=DEVICE)
    arguments = {name: t for name, t in arguments.items() if name != "state"}
    if "state" not in changes:
        with pytest.raises(ValueError, match=message.replace("attention_step", "attention_backward_step")):
            attention_backward_step(arguments["q"], lse=zeros, delta=zeros, **arguments)


KV = torch.zeros(1, 1, 2, 6, 16, device=DEVICE)
FAR = torch.empty(2**21 + 16, device=DEVICE).as_strided((1, 1, 2, 2, 16), (0, 0, 0, 2**21, 1))


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        (r"k is float16; it takes float32", dict(k=torch.zeros(1, 1, 2, 6, 16, dtype=torch.float16))),
        (r"q is float64; it takes float32, float16, bfloat16", dict(q=torch.zeros(1, 4, 6, 16).double())),
        (r"attention_step takes q \[B, H, Tq, d\].*\(1, 3, 6, 16\)", dict(q=torch.zeros(1, 3, 6, 16))),
        (r"attention_step takes q \[B, H, Tq, d\]", dict(v=torch.zeros(1, 1, 2, 5, 16))),
        (r"attention_step takes q \[B, H, Tq, d\]", dict(k=KV[0], v=KV[0])),
        (r"q_starts is int32; it takes int64", dict(q_starts=torch.zeros(1, dtype=torch.int32))),
        (r"q_starts must be \[n\], n dividing the 6 queries; got \(4,\)", dict(q_starts=torch.arange(4))),
        (r"k_starts must be \[S\*m\] for S=1 shards, m dividing their 6", dict(k_starts=ints(0, 1, 2, 3))),
        (r"q_first must be \[B, Tq\] \(1, 6\); got \(6,\)", dict(q_first=torch.arange(6))),
        (r"scale must be positive; got 0", dict(scale=0.0)),
        (r"q's last dim must be contiguous.*call", dict(q=torch.zeros(1, 4, 16, 6).mT)),
        (r"k's rows must lie less than 2097152 elements apart", dict(k=FAR, v=FAR)),
        (r"state must be what the step before returned", dict(state=AttentionState(*[KV[0]] * 3))),
    ],
)  # fmt: skip
@pytest.mark.skipif(DEVICE.type != "cpu", reason="the tensors of the table are on the CPU")
def test_what_it_does_not_take_is_refused(message, changes):
    refused(message, **changes)


@pytest.mark.parametrize("width", [12, 264])
def test_widths_that_it_does_not_take_are_refused(width):
    q, k, v, _ = inputs(2, 1, 6, 6, width, torch.float32)
    with pytest.raises(ValueError, match=f"heads are {width} wide; it takes multiples of 8 up to 256: pad"):
        attention(q, k, v, SCALE)


def test_gradients_that_do_not_fit_are_refused():
    q, k, v, dout = inputs(4, 2, 6, 6, 16, torch.float32)
    rows = torch.zeros(1, 4, 6, device=DEVICE)
    common = dict(q_starts=ints(0), k_starts=ints(0), scale=SCALE)
    for message, given in [
        ("give both or neither", dict(dk=torch.zeros_like(k))),
        (r"dq is float16; it takes float32", dict(dq=q.half())),
        (r"dk must be \(1, 1, 2, 6, 16\)", dict(dk=torch.zeros_like(k[0]), dv=torch.zeros_like(k))),
        ("dq's last dim must be contiguous", dict(dq=torch.zeros_like(q.mT.contiguous()).mT)),
    ]:
        with pytest.raises(ValueError, match=message):
            attention_backward_step(dout, q, k, v, rows, rows, **common, **given)
    with pytest.raises(ValueError, match="lse and delta must be contiguous"):
        attention_backward_step(dout, q, k, v, rows[..., :1].expand(1, 4, 6), rows, **common)
    with pytest.raises(ValueError, match=r"dout must be like q \(1, 4, 6, 16\)"):
        attention_backward_step(dout[..., :3, :], q, k, v, rows, rows, **common)
    with pytest.raises(ValueError, match=r"out and dout \[B, H, Tq, d\]"):
        attention_delta(dout, dout[0])


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_benchmarks_count_the_visible_pairs(direction):
    (benchmark,) = [b for b in bench.benchmarks(smoke=True) if b.name == f"attention/{direction}"]
    tokens, heads, d = (benchmark.shape[name] for name in ("tokens", "heads", "d"))
    pairs = sum(key <= query for query in range(tokens) for key in range(tokens))
    dots = 2 if direction == "forward" else 5
    assert benchmark.flops == heads * pairs * dots * 2 * d
    benchmark.make(DEVICE)["megatsp"]()
