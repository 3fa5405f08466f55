"""Kernels that the gate of megatsp_kernels.aot must refuse, and their sound neighbours.

python tests/kernels/violations.py      # prints {chip: {case: problems}} as JSON; without TRITON_INTERPRET
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace

import triton
import triton.language as tl
from megatsp_kernels.aot import CompileError, Variant, compile_variant, problems
from megatsp_kernels.common import Config


@triton.jit
def matmul_kernel(p_a, p_b, p_out, n, m, h, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr):
    """a [n, h] times b [h, m]."""
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    o_column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    b_out = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, h, INNER):
        o_inner = start + tl.arange(0, INNER)
        m_a, m_b = (o_row < n) & (o_inner[None, :] < h), (o_inner[:, None] < h) & (o_column < m)
        b_a = tl.load(p_a + o_row * h + o_inner[None, :], m_a, other=0.0)
        b_b = tl.load(p_b + o_inner[:, None].to(tl.int64) * m + o_column, m_b, other=0.0)
        b_out = tl.dot(b_a, b_b, b_out)
    tl.store(p_out + o_row * m + o_column, b_out.to(p_out.dtype.element_ty), (o_row < n) & (o_column < m))


@triton.jit
def wait_kernel(p_flag, p_data, ACQUIRE: tl.constexpr, RELEASE: tl.constexpr, SCOPE: tl.constexpr):
    """Polls a flag, copies, sets the next flag."""
    spins = 0
    seen = tl.atomic_add(p_flag, 0, sem=ACQUIRE, scope=SCOPE)
    while (seen < 1) & (spins < 1000):
        seen = tl.atomic_add(p_flag, 0, sem=ACQUIRE, scope=SCOPE)
        spins += 1
    o = tl.arange(0, 128)
    tl.store(p_data + 128 + o, tl.load(p_data + o))
    tl.debug_barrier()
    tl.atomic_xchg(p_flag + 1, 1, sem=RELEASE, scope=SCOPE)


@triton.jit
def add_kernel(p_out, p_x):
    o = tl.arange(0, 128)
    tl.atomic_add(p_out + o, tl.load(p_x + o), sem="relaxed")


@triton.jit
def wrong_kernel(p_x):
    tl.store(p_x + tl.arange(0, 3), 0.0)


def cases(target: str) -> Iterator[Variant]:
    """A variant of each label; those of labels that begin with "sound" have no problems."""
    sizes = dict(n="i32", m="i32", h="i32")
    pointers = dict(p_a="*bf16", p_b="*bf16", p_out="*bf16")
    tile = Config(dict(ROWS=128, COLUMNS=128, INNER=64), num_warps=4)
    sound = Variant(matmul_kernel, "sound product", pointers | sizes, {}, tile, ("m", "h"), matrix=True)
    yield sound
    wide = dict(ROWS=128, COLUMNS=256, INNER=32)  # accumulators alone: 128 KiB
    yield replace(sound, label="spills", config=Config(wide, num_warps=1 if target == "gfx942" else 4))
    deep = Config(dict(ROWS=64, COLUMNS=64, INNER=512), num_warps=4, num_stages=3)
    yield replace(sound, label="too much shared memory", config=deep)
    flags = dict(p_flag="*i32", p_data="*fp32")
    settings = {
        "sound wait": ("acquire", "release", "sys"),
        "relaxed wait": ("relaxed", "relaxed", "sys"),
        "wait on this GPU alone": ("acquire", "release", "gpu"),
    }
    for label, (acquire, release, scope) in settings.items():
        constants = dict(ACQUIRE=acquire, RELEASE=release, SCOPE=scope)
        yield Variant(wait_kernel, label, flags, constants, Config({}), waits=True)
    add = Variant(add_kernel, "atomic sum", dict(p_out="*fp32", p_x="*fp32"), {}, Config({}))
    yield add
    yield replace(add, label="no matrix instructions", matrix=True)
    yield Variant(wrong_kernel, "does not compile", dict(p_x="*fp32"), {}, Config({}))


def judged(variant: Variant, target: str) -> list[str]:
    try:
        return problems(compile_variant(variant, target), variant)
    except CompileError as error:
        return problems(error, variant)


if __name__ == "__main__":
    targets = ("gfx942", "sm_90")  # gfx950 is judged by the same text as gfx942
    report = {target: {v.label: judged(v, target) for v in cases(target)} for target in targets}
    json.dump(report, sys.stdout)
