"""What the attention kernels share: who computes which block, and which blocks it meets.

Positions are global; a tensor's tokens are equal chunks, each with the position of its first token. A
program's own block never spans two chunks. Against one chunk of the other side, what it meets is one
range of tokens, and within that range another in which nothing is masked: hence two loops, and no
visit to what is wholly masked.
"""

from collections.abc import Mapping
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
def split(low, high, full_low, full_high, SIZE: tl.constexpr):
    """Blocks of SIZE that cover the tokens low..high-1, of which full_low..full_high-1 need no mask.

    Returns: how many masked blocks begin at `low`; where the unmasked ones begin and how many they are;
    how many masked ones follow them.
    """
    num_blocks = tl.cdiv(tl.maximum(high - low, 0), SIZE)
    num_before = tl.minimum(tl.cdiv(tl.maximum(full_low - low, 0), SIZE), num_blocks)
    begin = low + num_before * SIZE
    num_full = tl.maximum(tl.minimum(full_high, high) - begin, 0) // SIZE
    num_after = tl.cdiv(tl.maximum(high - begin - num_full * SIZE, 0), SIZE)
    return num_before, begin, num_full, num_after


@triton.jit
def masked_block(i, low, num_before, begin, num_full, SIZE: tl.constexpr):
    """Where the i-th masked block of a `split` begins."""
    return tl.where(i < num_before, low + i * SIZE, begin + (num_full + i - num_before) * SIZE)


@triton.jit
def keys_of(p_start, k_length, position, count, first_low, first_high, SIZE: tl.constexpr):
    """The keys of a chunk that `count` queries from `position` on meet, as a `split`.

    first_low, first_high: the least and the greatest position of the first tokens that they see.
    Returns also the first masked key, the one past the last, and the chunk's first position.
    """
    start = tl.load(p_start).to(tl.int32)
    low = tl.maximum(first_low - start, 0)
    high = tl.where(start < 0, 0, tl.minimum(k_length, position + count - start))
    num_before, begin, num_full, num_after = split(
        low, high, first_high - start, position + 1 - start, SIZE
    )
    return low, high, start, num_before, begin, num_full, num_after


@triton.jit
def sees(o_key, o_last, o_least, DOCUMENTS: tl.constexpr):
    """[rows, keys]: whether o_least <= o_key <= o_last, of each row."""
    if DOCUMENTS:  # in one unsigned comparison: AMD keeps each mask of a lane in two scalar registers
        o_width = tl.maximum(o_last - o_least + 1, 0).to(tl.uint32)
        m = (o_key[None, :] - o_least[:, None]).to(tl.uint32) < o_width[:, None]
    else:
        m = o_key[None, :] <= o_last[:, None]
    return m


@triton.jit
def count_at_most(p_sorted, length, bound):
    """How many of `length` non-decreasing numbers are at most `bound`: a binary search."""
    low = bound * 0
    high = low + length
    while low < high:
        middle = (low + high) // 2
        is_in = tl.load(p_sorted + middle).to(tl.int32) <= bound
        low = tl.where(is_in, middle + 1, low)
        high = tl.where(is_in, high, middle)
    return low


@triton.jit
def clamp(o_row, count):
    """Rows from `count` on become the last one."""
    return tl.maximum(tl.minimum(o_row, count - 1), 0)  # the compiler need not be told that count > 0


@triton.jit
def load_rows(p, stride, o_row, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of width D from a scalar pointer to row 0; 0 beyond D.

    The pointer is 64 bits wide; within a block 32 bits are enough (op.py refuses wider strides), which
    lets AMD's buffer loads take them. Rows past the end are not masked but clamped by the caller, who
    masks what comes of them: on AMD a mask of loads stays in scalar registers, and those run out.
    """
    tl.assume(stride >= 0)
    tl.assume(stride <= 8388608)
    o_d = tl.arange(0, BLOCK_D)
    p_row = p + (o_row[:, None] * stride + o_d[None, :])
    if D < BLOCK_D:
        b = tl.load(p_row, (o_d < D)[None, :], other=0.0)
    else:
        b = tl.load(p_row)
    return b


@triton.jit
def store_rows(p, stride, o_row, m_row, b, D: tl.constexpr, BLOCK_D: tl.constexpr):
    tl.assume(stride >= 0)
    tl.assume(stride <= 8388608)
    o_d = tl.arange(0, BLOCK_D)
    p_row = p + (o_row[:, None] * stride + o_d[None, :])
    tl.store(p_row, b.to(p.dtype.element_ty), m_row[:, None] & (o_d < D)[None, :])


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


def table(tables: Mapping[int, Table], width: int, itemsize: int) -> Table:
    """The tiles for a head's width and the bytes of its elements: as wide rows, as few of them."""
    row_bytes = sizes(width)["BLOCK_D"] * itemsize
    return next((tables[size] for size in sorted(tables) if row_bytes <= size), tables[max(tables)])


def sizes(width: int) -> dict[str, int]:
    """The constants that follow from a head's width."""
    return dict(D=width, BLOCK_D=max(16, triton.next_power_of_2(width)))
