"""What the attention kernels share: who computes which block, and which blocks it meets.

Positions are global; a tensor's tokens are equal chunks, each with the position of its first token. A
program's own block never spans two chunks. What it meets of one chunk of the other side is one range of
tokens, and within that another in which nothing is masked: nothing else is visited, and a mask is
computed for the blocks at the range's ends alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import triton
import triton.language as tl

from megatsp_kernels.aot import Variant
from megatsp_kernels.common import Config, Table

WIDTHS = (64, 96, 128, 256)  # that are compiled ahead of time
# Heads of K/V that are computed at a time. Workgroups of gfx942 and gfx950 go round-robin to 8 XCDs: each
# XCD then works on one such head and keeps it in its L2. Elsewhere 8 is what an L2 of 50 MB holds.
SET = tl.constexpr(8)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def program(pid, groups, items):
    """This program's group (one head of K/V of one sequence) and its item among the group's `items`.

    Item 0 of all groups of a set comes first: give it the heaviest work. The groups beyond the last whole
    set are dealt out so that all XCDs have work, and the same group on each where their number divides 8.
    """
    whole = groups // SET * SET
    local = pid // SET
    rest = pid - whole * items
    num_rest = tl.maximum(groups - whole, 1)
    in_set = rest < 0
    i_group = tl.where(in_set, local // items * SET + pid % SET, whole + rest % num_rest)
    return i_group, tl.where(in_set, local % items, rest // num_rest)


@triton.jit
def keys_of(p_start, k_length, position, count, first_low, first_high, SIZE: tl.constexpr):
    """The keys of a chunk that `count` queries from `position` on meet.

    first_low, first_high: the least and the greatest of the positions from which on these queries see.
    Returns: the first key that any sees, the one past the last, how many blocks of SIZE that is; the
    first key that all see and the one past the last; the chunk's position. A negative one is absent.
    """
    start = tl.load(p_start).to(tl.int32)
    low = tl.maximum(first_low - start, 0)
    high = tl.where(start < 0, 0, tl.minimum(k_length, position + count - start))
    full_high = tl.minimum(high, position + 1 - start)
    return low, high, tl.cdiv(tl.maximum(high - low, 0), SIZE), first_high - start, full_high, start


@triton.jit
def between(o, o_low, o_high):
    """[len(o_low), len(o)]: whether o_low <= o < o_high.

    One unsigned comparison: AMD keeps a mask in two scalar registers for each of a lane's elements.
    """
    o_width = tl.maximum(o_high - o_low, 0).to(tl.uint32)
    return (o[None, :] - o_low[:, None]).to(tl.uint32) < o_width[:, None]


@triton.jit
def count_at_most(p_sorted, length, o_bound):
    """For each bound, how many of `length` non-decreasing numbers are at most that: a binary search."""
    step = length * 0 + 1
    while step * 2 <= length:
        step *= 2
    o_count = o_bound * 0
    while step > 0:
        o_next = o_count + step
        b = tl.load(p_sorted + o_next - 1, o_next <= length, other=0).to(tl.int32)
        o_count = tl.where((o_next <= length) & (b <= o_bound), o_next, o_count)
        step = step // 2
    return o_count


@triton.jit
def load_rows(p, stride, o_row, count, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of width D from a scalar pointer to row 0; 0 beyond D.

    From row `count` on it is row count-1 again, and the caller masks what comes of it: a mask here would
    stay in AMD's scalar registers, and those run out. The pointer is 64 bits wide; within a block 32 are
    enough (op.py refuses wider strides), and AMD's buffer loads take them.
    """
    tl.assume(stride >= 0)
    tl.assume(stride <= 2097152)
    o_d = tl.arange(0, BLOCK_D)
    o_start = tl.maximum(tl.minimum(o_row * stride, (count - 1) * stride), 0)  # provably small
    p_row = p + (o_start[:, None] + o_d[None, :])
    if D < BLOCK_D:  # noqa: SIM108
        b = tl.load(p_row, (o_d < D)[None, :], other=0.0)
    else:
        b = tl.load(p_row)
    return b


@triton.jit
def store_rows(p, stride, o_row, count, b, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The first `count` rows, of width D."""
    tl.assume(stride >= 0)
    tl.assume(stride <= 2097152)
    o_d = tl.arange(0, BLOCK_D)
    p_row = p + (o_row[:, None] * stride + o_d[None, :])
    tl.store(p_row, b.to(p.dtype.element_ty), (o_row < count)[:, None] & (o_d < D)[None, :])


def variant(
    kernel: Any, label: str, pointers: Mapping[str, str], constants: Mapping[str, Any], config: Config
) -> Variant:
    """A kernel as it is compiled where strides and chunk lengths are multiples of 16."""
    known = {**constants, **config.blocks}
    names = [name for name in kernel.arg_names if name not in known]
    signature = {n: pointers.get(n, "fp32" if n == "scale" else "i32") for n in names}
    numbers = [n for n in names if signature[n] == "i32"]
    aligned = tuple(n for n in numbers if n.endswith(("_s", "_b", "_h", "_t", "length")))
    return Variant(kernel, label, signature, constants, config, aligned, matrix="KEYS" in config.blocks)


def defaults_first(configs: Sequence[Config]) -> list[tuple[Config, bool]]:
    """Each config of a chip with whether it is the one that is used."""
    return [(config, i == 0) for i, config in enumerate(configs)]


def table(tables: Mapping[int, Table], width: int, itemsize: int) -> Table:
    """The tiles for heads of a width: those of the smallest row that is as long, or of the longest."""
    return next((tables[size] for size in sorted(tables) if width * itemsize <= size), tables[max(tables)])


def sizes(width: int) -> dict[str, int]:
    """The constants that follow from a head's width."""
    return dict(D=width, BLOCK_D=max(16, triton.next_power_of_2(width)))
