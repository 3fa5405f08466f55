"""Streamed products equal the plain text, between simulated peers and between real ranks; waits end."""

import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from checks import DEVICE, DTYPES, Poisoned, assert_near, randn
from distributed import run_distributed
from megatsp_kernels.aot import has_system_scope
from megatsp_kernels.peers import PeerError, local, shared
from megatsp_kernels.streamed import (
    Exchange,
    layout_for,
    matmul_pull,
    matmul_scatter,
    probe,
    publish,
    pull,
    reduce,
)
from megatsp_kernels.streamed.bench import benchmarks
from megatsp_kernels.streamed.op import Pull, reduce_programs
from megatsp_kernels.streamed.reference import bucket, gradient
from megatsp_kernels.streamed.reference import matmul as reference
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from waiting import LIMIT_S

WIDTHS = (9, 6, 1)  # columns of a bucket's three matrices; the first two are stored the other way round


def columns_of(rank: int, epoch: int, rows: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """A rank's slice [rows, n_i] of each matrix, as h-major views of part of a shard."""
    shards = [randn(20, rows, seed=7 * rank + 31 * epoch + i, dtype=dtype) for i in range(3)]
    return [s.t()[:, 2 : 2 + n] if i < 2 else s.t().contiguous()[:, 2 : 2 + n]
            for i, (s, n) in enumerate(zip(shards, WIDTHS, strict=True))]  # fmt: skip


def factors_of(rank: int, epoch: int, h: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What a rank's gradient is the product of: [h, n] (tokens, transposed) and [n, R]."""
    tokens = randn(5, h, seed=rank + 100 * epoch, dtype=dtype)
    return tokens.t(), randn(5, sum(WIDTHS), seed=50 + rank + 100 * epoch, dtype=dtype)


def exchanges(ranks: int, rows: int, timeout_s: float = LIMIT_S, slack: int = 0) -> list[Exchange]:
    """One a simulated peer. slack: bytes of a slice that stay free."""
    most = 4 * rows * sum(WIDTHS) + slack
    layout = layout_for(ranks, most, most, DEVICE)
    return [Exchange(m, layout, timeout_s) for m in local(layout.num_bytes, ranks, DEVICE)]


def outs_of(rows: int, memory: Poisoned) -> list[Tensor]:
    """Where a gradient's columns go, of the shapes that `columns_of` has."""
    return [memory.empty(n, rows).t() if i < 2 else memory.empty(rows, n) for i, n in enumerate(WIDTHS)]


def round_of(
    group: Sequence[Exchange], epoch: int, rows: int, dtype: torch.dtype, memory: Poisoned
) -> list[Tensor]:
    """One bucket and its gradient among simulated peers; asserts both, returns the gradients."""
    ranks = len(group)
    posted = [e.publish(columns_of(e.memory.rank, epoch, rows), dtype) for e in group]
    a, b = randn(3, 7, dtype=dtype, seed=epoch), randn(7, 18, dtype=dtype, seed=epoch + 1)
    products = [e.matmul(a, b) for e in group]
    whole = bucket([columns_of(rank, epoch, rows) for rank in range(ranks)], dtype)
    for entry in posted:
        assert torch.equal(entry.landing, whole)
    assert_near(products, [a @ b] * ranks, [reference(a.double(), b.double())] * ranks)

    outs = [outs_of(rows, memory) for _ in group]
    collected = [e.collect(o) for e, o in zip(group, outs, strict=True)]
    factors = [factors_of(rank, epoch, ranks * rows, dtype) for rank in range(ranks)]
    for entry, (a, b) in zip(collected, factors, strict=True):
        first = sum(WIDTHS[:2])
        entry.add(a, b[:, first:].contiguous(), first)  # out of order, as attention's output comes first
        entry.add(a, b[:, :first], 0)
    for entry in collected:
        entry.wait()
    found = [torch.cat(o, 1) for o in outs]
    for rank, mine in enumerate(found):
        exact = gradient([(a.double(), b.double()) for a, b in factors], rank)
        assert_near([mine], [exact.float()], [exact])
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "h", "m"), [(1, 1, 1), (17, 33, 18), (40, 16, 50), (0, 4, 5), (3, 0, 4), (4, 3, 0)]
)
def test_a_product_equals_the_reference(n, h, m, dtype):
    memory = Poisoned()
    a, b = randn(n, h, dtype=dtype), randn(h, m, dtype=dtype, seed=1)
    layouts = [
        (memory.of(a), memory.of(b)),
        (memory.of(a.t()).t(), memory.of(b.t()).t()),
        (memory.of(torch.cat([a, a], 1))[:, :h], memory.of(torch.cat([b, b], 1))[:, m:]),
    ]
    for left, right in layouts:
        out = matmul_pull(left, right)
        assert out.is_contiguous()
        assert_near([out], [a @ b], [reference(a.double(), b.double())])
    memory.check()


@pytest.mark.parametrize("stride", [0, 1, 3, 2**21])
def test_a_dim_of_one_element_may_have_any_stride(stride):
    memory, row = Poisoned(), randn(1, 7)
    storage = memory.of(row)
    for a, b in (
        (storage.as_strided((1, 7), (stride, 1)), memory.of(randn(7, 5))),
        (memory.of(randn(5, 7)), storage.as_strided((7, 1), (1, stride))),
        (storage.as_strided((7, 1), (1, stride)), storage.as_strided((1, 7), (stride, 1))),
    ):
        assert_near([matmul_pull(a, b)], [a @ b], [reference(a.double(), b.double())])
        exchange, out = exchanges(1, a.shape[0])[0], memory.empty(a.shape[0], b.shape[1])
        collected = exchange.collect([out])
        collected.add(a, b, 0)
        collected.wait()
        assert_near([out], [a @ b], [reference(a.double(), b.double())])
    memory.check()


@pytest.mark.parametrize(
    ("ranks", "rows", "dtype"), [(1, 5, DTYPES[1]), (2, 1, DTYPES[1]), (3, 7, DTYPES[0])]
)
def test_simulated_peers_get_buckets_and_gradients(ranks, rows, dtype):
    memory, group = Poisoned(), exchanges(ranks, rows)
    first = round_of(group, 1, rows, dtype, memory)
    for epoch in range(2, 6):  # every slot is used three times
        round_of(group, epoch, rows, dtype, memory)
    again = round_of(group, 1, rows, dtype, memory)
    assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))  # to the bit
    memory.check()


@pytest.mark.parametrize("rows", [5, 7])
def test_what_is_not_a_slice_is_not_touched(rows):
    slack = 640
    group = exchanges(2, rows, slack=slack)
    layout, used = group[0].layout, 4 * rows * sum(WIDTHS)
    free = [slice(layout.slot(e) + used, layout.slot(e) + used + slack) for e in (0, 1)]
    for epoch in (0, 1):
        starts = [layout.staging(epoch) + r * layout.source_bytes + used for r in range(2)]
        free += [slice(start, start + slack) for start in starts]
    for exchange in group:
        for region in free:
            exchange.memory.local[region] = 123
    for epoch in (1, 2):
        round_of(group, epoch, rows, torch.float32, Poisoned())
    for exchange in group:
        for region in free:
            assert (exchange.memory.local[region] == 123).all()
    memory, columns = Poisoned(), [columns_of(rank, 3, rows) for rank in range(2)]
    for exchange, own in zip(group, columns, strict=True):
        publish(exchange.peers, 3, [memory.of(c) for c in own], torch.float32)
    for exchange in group:
        landing = memory.empty(2 * rows, sum(WIDTHS))
        pull(Pull(exchange.peers, 3, landing))
        assert torch.equal(landing, bucket(columns, torch.float32))
    memory.check()


def test_counters_wrap_around():
    group = exchanges(2, 3)
    for exchange in group:
        flags = exchange.memory.local[: exchange.layout.failed].view(torch.int32)
        flags[::32] = 2**31 - 2
        exchange._epoch = exchange._gradient_epoch = exchange._arrived = 2**31 - 2
        layout = exchange.layout
        programs = reduce_programs(DEVICE)
        first, last = layout.freed // 4, layout.failed // 4
        flags[first:last:32] = (programs * (2**31 - 2) + 2**31) % 2**32 - 2**31
    for epoch in range(1, 5):
        round_of(group, epoch, 3, torch.float32, Poisoned())


def test_an_older_bucket_is_pulled_before_another_is_published():
    group = exchanges(2, 5)
    older = [e.publish(columns_of(e.memory.rank, 1, 5), torch.float32) for e in group]
    for exchange in group:
        exchange._posted.landing.fill_(7)
    newer = [e.publish(columns_of(e.memory.rank, 2, 5), torch.float32) for e in group]
    for entry in newer:
        entry.wait()
        entry.wait()  # a second time costs nothing
    for epoch, entries in ((1, older), (2, newer)):
        whole = bucket([columns_of(rank, epoch, 5) for rank in range(2)], torch.float32)
        assert all(torch.equal(entry.landing, whole) for entry in entries)


def never(what: str) -> tuple[Exchange, Tensor | None, str]:
    """Rank 0 of two does what rank 1 would have to answer: the exchange, what must be NaN, the error."""
    rows, (zero, one) = 4, exchanges(2, 4, timeout_s=0.02)
    columns = columns_of(0, 1, rows)
    if what == "publish":
        posted = zero.publish(columns, torch.float32)
        product = zero.matmul(randn(3, 8), randn(8, 4))
        assert torch.equal(posted.landing[:rows], torch.cat(columns, 1)) and product.isfinite().all()
        return zero, posted.landing[rows:], "rank 1's flag 'slice of epoch 1': it is at 0"
    if what == "pull":
        one.publish(columns, torch.float32)
        zero.publish(columns, torch.float32).wait()
        for epoch in (2, 3):
            publish(one.peers, epoch, columns, torch.float32)
            publish(zero.peers, epoch, [epoch + c for c in columns], torch.float32)
        start, used = zero.layout.slot(1), 4 * rows * sum(WIDTHS)
        kept = zero.memory.local[start : start + used].view(torch.float32)
        assert torch.equal(kept, torch.cat(columns, 1).flatten())  # rank 1 may still read it
        return zero, None, "rank 1's flag 'epoch 1 copied from here': it is at 0"
    a, b = factors_of(0, 1, 2 * rows, torch.float32)
    outs = outs_of(rows, Poisoned())
    for out in outs:
        out.fill_(0)
    if what == "scatter":
        collected = zero.collect(outs)
        collected.add(a, b, 0)
        collected.wait()
        return zero, torch.cat(outs, 1), "rank 1's flag 'gradient tile 1 written here': it is at 0"
    for epoch in (1, 2, 3):
        matmul_scatter(epoch * a, b, zero.peers, epoch, (epoch - 2) * 2, 0, b.shape[1])
        matmul_scatter(a, b, one.peers, epoch, -1, 0, b.shape[1])
        reduce(zero.peers, epoch, epoch, outs)
    start, used = one.layout.staging(1), 4 * rows * sum(WIDTHS)
    kept = one.memory.local[start : start + used].view(torch.float32)
    assert_near([kept], [kept], [(a[rows:].double() @ b.double()).flatten()])  # rank 1 may still sum it
    return zero, None, "rank 1's flag 'summing program 2 of what was written there': it is at 0"


@pytest.mark.skipif(DEVICE.type == "cuda", reason="counts the interpreter's tiles")
@pytest.mark.parametrize("what", ["publish", "pull", "scatter", "reduce"])
def test_a_wait_in_vain_ends_and_names_rank_and_flag(what):
    exchange, lost, message = never(what)
    assert lost is None or lost.isnan().all()
    with pytest.raises(PeerError, match=f"rank 0 waited 0.02 s for {message}"):
        exchange.check()
    with pytest.raises(PeerError, match=message):  # nor does anything else begin
        exchange.publish(columns_of(0, 9, 4), torch.float32)
    with pytest.raises(PeerError, match=message):
        exchange.collect(outs_of(4, Poisoned()))


def test_after_a_wait_in_vain_no_other_lasts():
    exchange = never("publish")[0]
    exchange.set_timeout(3600)
    landing = torch.zeros(8, 16, device=DEVICE)
    pull(Pull(exchange.peers, 5, landing))  # in an hour, or pytest's limit of a test strikes
    assert landing.isnan().all()


def rank_rounds(ranks: int, rows: int, epochs: int, name: str) -> list[str]:
    """On a rank: many epochs at random speeds, two buckets ahead of their gradients; what is wrong."""
    rank, dtype, wrong = dist.get_rank(), getattr(torch, name), []
    most = 4 * rows * sum(WIDTHS)
    layout = layout_for(ranks, most, most, torch.device("cpu"))
    exchange = Exchange(shared(layout.num_bytes), layout, LIMIT_S)
    chance, memory = random.Random(rank), Poisoned()
    held: list[tuple] = []

    def check(epoch: int, collected, outs) -> None:
        collected.wait()
        factors = [factors_of(r, epoch, ranks * rows, dtype) for r in range(ranks)]
        exact = gradient([(a.double(), b.double()) for a, b in factors], rank)
        assert_near([torch.cat(outs, 1)], [exact.float()], [exact])

    for epoch in range(epochs):
        posted = exchange.publish(columns_of(rank, epoch, rows), dtype)
        time.sleep(0.03 * chance.random() + (0.4 if (rank, epoch) == (ranks - 1, 2) else 0))
        if epoch % 3:
            exchange.matmul(randn(2, 3, dtype=dtype), randn(3, 4, dtype=dtype))
        posted.wait()
        whole = bucket([columns_of(r, epoch, rows) for r in range(ranks)], dtype)
        if not torch.equal(posted.landing, whole):
            wrong.append(f"bucket {epoch}")
        outs = outs_of(rows, memory)
        collected = exchange.collect(outs)
        a, b = factors_of(rank, epoch, ranks * rows, dtype)
        collected.add(a, b, 0)
        held.append((epoch, collected, outs))
        if len(held) > 1 and epoch % 4:  # otherwise a later one forces it
            check(*held.pop(0))
        if len(held) > 3:
            check(*held.pop(0))
    for entry in held:
        check(*entry)
    exchange.check()
    memory.check()
    dist.barrier()
    exchange.close()
    return wrong


@pytest.mark.skipif(DEVICE.type == "cuda", reason="CPU ranks need the interpreter")
@pytest.mark.parametrize(("ranks", "rows", "epochs", "dtype"), [(2, 7, 6, "float32"), (4, 3, 5, "float16")])
def test_real_ranks_get_buckets_and_gradients(ranks, rows, epochs, dtype):
    assert run_distributed(rank_rounds, ranks, ranks, rows, epochs, dtype) == [[]] * ranks


def rank_beside_a_dead_one() -> tuple[str, int]:
    rank = dist.get_rank()
    layout = layout_for(3, 1000, 1000, torch.device("cpu"))
    exchange = Exchange(shared(layout.num_bytes), layout, timeout_s=0.5)
    dist.barrier()
    if rank == 2:
        dist.barrier()
        return "", 0
    epochs = 0
    with pytest.raises(PeerError) as caught:
        for epoch in range(3):
            posted = exchange.publish(columns_of(rank, epoch, 4), torch.float32)
            if epoch == 0:
                dist.barrier()  # so that nobody waits for one that is merely slow
            posted.wait()
            assert posted.landing[8:].isnan().all()
            epochs += 1
    return str(caught.value), epochs


@pytest.mark.skipif(DEVICE.type == "cuda", reason="CPU ranks need the interpreter")
def test_a_dead_rank_is_named_after_one_wait():
    for rank, (message, waits) in enumerate(run_distributed(rank_beside_a_dead_one, 3)[:2]):
        assert message.startswith(
            f"rank {rank} waited 0.5 s for rank 2's flag 'slice of epoch 1': it is at 0"
        )
        assert waits == 1


def rank_probe(breaks: str) -> str | None:
    layout = layout_for(2, 256, 256, torch.device("cpu"))
    exchange = Exchange(shared(layout.num_bytes), layout, LIMIT_S)
    (elsewhere,) = local(layout.num_bytes, 1, torch.device("cpu"))
    if dist.get_rank() == 1 and breaks == "writes":
        exchange.memory.table[0] = elsewhere.table[0]  # what it writes to rank 0 goes nowhere
    if dist.get_rank() == 1 and breaks == "values":
        import megatsp_kernels.streamed.exchange as module

        true = module.publish
        module.publish = lambda peers, epoch, columns, dtype: true(  # type: ignore[assignment]
            peers, epoch, [c + (epoch == 3) for c in columns], dtype
        )
    return probe(exchange, torch.float32, timeout_s=0.3 if breaks == "writes" else LIMIT_S)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="CPU ranks need the interpreter")
@pytest.mark.parametrize(
    ("breaks", "reason"),
    [
        ("", None),
        ("writes", "rank 0: PeerError: rank 0 waited 0.3 s for rank 1's flag 'slice of epoch 1': it is at 0"),
        ("values", "rank 0: the bucket pulled is wrong in "),
    ],
)
def test_a_probe_finds_what_does_not_work(breaks, reason):
    first, second = run_distributed(rank_probe, 2, breaks)
    assert first == second
    assert first is None if reason is None else first.startswith(reason)


def test_it_works_on_fake_tensors():
    with FakeTensorMode():
        a, b = torch.empty(3, 5, dtype=torch.bfloat16), torch.empty(5, 7, dtype=torch.bfloat16)
        out = matmul_pull(a, b)
        assert (out.shape, out.dtype) == ((3, 7), torch.bfloat16)


def test_custom_ops_say_what_they_do():
    group = exchanges(1, 5)
    peers, layout = group[0].peers, group[0].layout
    a, b = randn(3, 5), randn(5, 4)
    torch.library.opcheck(torch.ops.megatsp.streamed_matmul.default, (a, b))
    numbers = [9, 0, layout.ready, layout.pulled, layout.failed]
    arguments = (peers.memory.table, peers.status.tensor)
    torch.library.opcheck(
        torch.ops.megatsp.streamed_matmul_pull.default,
        (a, b, torch.zeros(5, 16, device=DEVICE), *arguments, layout.slot(0), 0, 1, layout.pieces, numbers),
    )


def refusals() -> list[tuple]:
    """Calls with one thing wrong, and what is said of it."""
    (exchange,) = exchanges(1, 4)
    peers, ok = exchange.peers, torch.zeros(4, 4, device=DEVICE)
    job = Pull(peers, 1, torch.zeros(4, 16, device=DEVICE))
    wide, long = ok.double(), torch.zeros(2**21 + 4, device=DEVICE).as_strided((2, 4), (2**21, 1))
    copy = r"use .contiguous\(\)"
    return [
        (lambda: matmul_pull(wide, wide), "a is float64; it takes float32, float16, bfloat16"),
        (lambda: matmul_pull(ok, ok.half()), r"of one dtype; got \(4, 4\) torch.float32 and .*float16"),
        (lambda: matmul_pull(ok, ok[:3]), r"a \[n, k\] and b \[k, m\].*got \(4, 4\)"),
        (lambda: matmul_pull(ok[::2, ::2], ok[:2]), r"a must have a stride of 1.*use .contiguous\(\)"),
        (lambda: matmul_pull(long, ok), "no stride or row of 2097152 or more"),
        (lambda: matmul_pull(ok[:1].expand(4, 4), ok), rf"a must .* strides \(0, 1\): {copy}"),
        (lambda: matmul_pull(ok, ok[:, :1].expand(4, 4)), rf"b must .* strides \(4, 0\): {copy}"),
        (lambda: matmul_pull(ok[0, 0].expand(4, 4), ok, job), rf"a must .* strides \(0, 0\): {copy}"),
        (lambda: matmul_scatter(ok[:, :1].expand(4, 4), ok, peers, 1, 0, 0, 16), r"a .* strides \(4, 0\)"),
        (lambda: matmul_scatter(ok, ok[:1].expand(4, 4), peers, 1, 0, 0, 16), r"b .* strides \(0, 1\)"),
        (lambda: matmul_pull(ok, ok, replace(job, landing=ok[0])), r"landing must be contiguous \[h, R\]"),
        (lambda: pull(replace(job, landing=ok.new_zeros(4, 99))), "1584 bytes, but the layout's slice_bytes"),
        (lambda: publish(peers, 1, [], torch.float32), "one to 4 column ranges; got 0"),
        (lambda: publish(peers, 1, [ok, ok[:3]], torch.float32), r"as many rows; got \[\(4, 4\), \(3, 4\)\]"),
        (lambda: publish(peers, 1, [ok, ok.half()], torch.float32), "columns must be .* of one dtype"),
        (lambda: publish(peers, 1, [ok], torch.float64), "dtype is torch.float64"),
        (lambda: publish(peers, 1, [ok.new_zeros(4, 99)], torch.float16), "792 bytes, but the layout's"),
        (lambda: matmul_scatter(ok, ok, peers, 1, 0, 13, 16), "columns 13 to 17 lie in 16"),
        (lambda: matmul_scatter(ok, ok, peers, 1, 0, 0, 99), "1584 bytes, but the layout's gradient_bytes"),
        (lambda: reduce(peers, 1, 0, [ok.half()]), r"columns\[0\] is float16; it takes float32"),
        (lambda: reduce(peers, 1, 0, [ok, ok[:1].expand(4, 4)]), r"columns\[1\] .* strides \(0, 1\)"),
        (lambda: exchange.collect([ok[:, :1].expand(4, 4)]), r"collect: .* itself.* strides \(4, 0\)"),
    ]  # fmt: skip


@pytest.mark.parametrize("index", range(22))
def test_what_it_does_not_take_is_refused(index):
    call, message = refusals()[index]
    with pytest.raises(ValueError, match=message):
        call()


def test_benchmarks_run():
    found = list(benchmarks(smoke=True))
    assert len(found) == 6
    for benchmark in found:
        for name, timed in benchmark.make(DEVICE).items():
            assert timed() is None or name
    by_name = {b.name: b for b in found}
    assert by_name["streamed/matmul"].flops == 2 * 7 * 10 * 12
    assert by_name["streamed/pull"].bytes == 2 * 10 * 18 * 2


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from megatsp_kernels.aot import has_system_scope
from megatsp_kernels.streamed.triton import variants
for target, chip, text in (
    ("gfx942", GPUTarget("hip", "gfx942", 64), "amdgcn"), ("sm_90", GPUTarget("cuda", 90, 32), "ptx")
):
    for v in variants(target):
        if v.label != "streamed/publish":
            continue
        signature = {n: v.signature.get(n, "constexpr") for n in v.kernel.arg_names}
        source = ASTSource(v.kernel, signature, {**v.constants, **v.config.blocks})
        asm = triton.compile(source, target=chip, options=v.config.options(target)).asm[text]
        print(target, v.label, has_system_scope(asm, target), flush=True)
"""


def test_waits_acquire_and_release_for_the_whole_system():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=LIMIT_S
    )
    lines = result.stdout.splitlines()
    assert lines == [f"{target} streamed/publish True" for target in ("gfx942", "sm_90")], result.stderr


@pytest.mark.parametrize(
    ("asm", "target", "expected"),
    [
        ("buffer_inv sc0 sc1\nbuffer_wbl2 sc0 sc1", "gfx942", True),
        ("buffer_inv sc1\nbuffer_wbl2 sc1", "gfx942", False),
        ("buffer_inv sc0 sc1\n", "gfx950", False),
        ("@%p1 atom.global.sys.acquire.add.u32 %r1;\natom.global.sys.release.exch.b32 %r2;", "sm_90", True),
        ("atom.global.gpu.acquire.add.u32 %r1;\natom.global.gpu.release.exch.b32 %r2;", "sm_90", False),
        ("atom.global.sys.relaxed.add.u32 %r1;\natom.global.sys.release.exch.b32 %r2;", "sm_90", False),
        ("fence.acq_rel.sys;", "sm_90", True),
    ],
)
def test_scopes_are_told_apart(asm, target, expected):
    assert has_system_scope(asm, target) == expected
