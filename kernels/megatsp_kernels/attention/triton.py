"""Flash attention forward as a step: a block of queries a program, whose state enters and leaves."""

from collections.abc import Iterator
from itertools import product

import triton
import triton.language as tl

from megatsp_kernels.aot import Variant
from megatsp_kernels.attention import triton_backward
from megatsp_kernels.attention.triton_blocks import (
    LOG2E,
    WIDTHS,
    between,
    defaults_first,
    keys_of,
    load_rows,
    program,
    sizes,
    store_rows,
    table,
    variant,
)
from megatsp_kernels.common import Config, Table

_CDNA = dict(waves_per_eu=2, matrix_instr_nonkdim=16)
_INTERPRETER = [Config(dict(QUERIES=16, KEYS=8))]
# On AMD 32 queries a warp: half as much is read from LDS as with 16. More keys at a time, or 16 queries a
# warp where a row is 512 bytes, is what registers allow without spills in every variant. One stage: the
# other of a SIMD's two waves hides the loads.
_AMD_128 = [Config(dict(QUERIES=128, KEYS=64), num_warps=4, num_stages=1, amd=_CDNA)]
_AMD_256 = [
    Config(dict(QUERIES=128, KEYS=32), num_warps=4, num_stages=1, amd=_CDNA),
    Config(dict(QUERIES=128, KEYS=64), num_warps=8, num_stages=1, amd=_CDNA),  # fewer, longer steps
]
_AMD_512 = [
    Config(dict(QUERIES=64, KEYS=32), num_warps=4, num_stages=1, amd=_CDNA),
    Config(dict(QUERIES=128, KEYS=32), num_warps=8, num_stages=1, amd=_CDNA),  # K/V are read half as often
]
# By the bytes of a row. sm_90: 64 queries for each warpgroup of 4 warps, as wgmma wants; 128 keys
# would spill.
TABLES: dict[int, Table] = {
    128: {
        "gfx942": _AMD_128,
        "gfx950": _AMD_128,
        "sm_90": [Config(dict(QUERIES=128, KEYS=64), num_warps=8, num_stages=3)],
        "interpreter": _INTERPRETER,
    },
    256: {
        "gfx942": _AMD_256,
        "gfx950": _AMD_256,
        "sm_90": [
            Config(dict(QUERIES=128, KEYS=64), num_warps=8, num_stages=3),
            Config(dict(QUERIES=128, KEYS=64), num_warps=8, num_stages=2),
        ],
        "interpreter": _INTERPRETER,
    },
    512: {
        "gfx942": _AMD_512,
        "gfx950": _AMD_512,
        "sm_90": [Config(dict(QUERIES=64, KEYS=64), num_warps=8, num_stages=2)],
        "interpreter": _INTERPRETER,
    },
}


@triton.jit
def forward_kernel(
    p_q, p_k, p_v, p_q_starts, p_k_starts, p_q_first, p_out, p_lse, p_total, p_max, p_sum,
    q_b, q_h, q_t, k_s, k_b, k_h, k_t, v_s, v_b, v_h, v_t, first_b,
    batch, heads, kv_heads, q_chunks, q_length, shards, k_chunks, k_length, scale,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    DOCUMENTS: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Maxima and sums are of powers of two: exp2 is the hardware's own."""
    num_blocks = tl.cdiv(q_length, QUERIES)
    group = heads // kv_heads
    i_group, i_item = program(tl.program_id(0), batch * kv_heads, group * q_chunks * num_blocks)
    i_b, i_kv = (i_group // kv_heads).to(tl.int64), (i_group % kv_heads).to(tl.int64)
    i_h = i_kv * group + i_item % group
    i_block = q_chunks * num_blocks - 1 - i_item // group  # the last queries see most: they go first
    i_q_chunk, i_row = i_block // num_blocks, i_block % num_blocks * QUERIES
    i_token = (i_q_chunk * q_length + i_row).to(tl.int64)
    i_flat = (i_b * heads + i_h) * q_chunks * q_length + i_token

    count = tl.minimum(q_length - i_row, QUERIES)
    o_row = tl.arange(0, QUERIES)
    o_clamped = tl.minimum(o_row, count - 1)
    position = tl.load(p_q_starts + i_q_chunk).to(tl.int32) + i_row
    b_q = load_rows(p_q + i_b * q_b + i_h * q_h + i_token * q_t, q_t, o_row, count, D, BLOCK_D)
    first_low, first_high, o_first = 0, 0, o_row * 0
    if DOCUMENTS:
        p_first = p_q_first + i_b * first_b + i_token
        first_low = tl.load(p_first).to(tl.int32)
        first_high = tl.load(p_first + count - 1).to(tl.int32)
        o_first = tl.load(p_first + o_clamped).to(tl.int32)

    b_total = tl.zeros([QUERIES, BLOCK_D], tl.float32)
    b_max = tl.full([QUERIES], float("-inf"), tl.float32)
    b_sum = tl.zeros([QUERIES], tl.float32)
    scale *= LOG2E
    p_k += i_b * k_b + i_kv * k_h
    p_v += i_b * v_b + i_kv * v_h
    for i_shard in range(shards):
        for i_chunk in range(k_chunks):
            low, high, num_met, full_low, full_high, start = keys_of(
                p_k_starts + i_shard * k_chunks + i_chunk,
                k_length, position, count, first_low, first_high, KEYS,
            )  # fmt: skip
            i_key = tl.cast(i_chunk, tl.int64) * k_length + low
            p_k_block = p_k + tl.cast(i_shard, tl.int64) * k_s + i_key * k_t
            p_v_block = p_v + tl.cast(i_shard, tl.int64) * v_s + i_key * v_t
            o_low, o_high = o_first - start, tl.minimum(position - start + 1 + o_row, high)
            for i in range(num_met):
                i_first = low + i * KEYS
                is_full = (i_first >= full_low) & (i_first + KEYS <= full_high)
                b_total, b_max, b_sum = _attend(
                    b_total, b_max, b_sum, b_q, p_k_block, p_v_block, k_t, v_t, i_first, high - i_first,
                    is_full, o_low, o_high, scale, KEYS, D, BLOCK_D,
                )  # fmt: skip
                p_k_block += tl.cast(k_t, tl.int64) * KEYS
                p_v_block += tl.cast(v_t, tl.int64) * KEYS

    if not FIRST:  # merged at the end: the loop has the registers to itself
        b_old_max, b_old_sum = tl.load(p_max + i_flat + o_clamped), tl.load(p_sum + i_flat + o_clamped)
        b_new = tl.maximum(b_old_max, b_max)
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_decay, b_old_decay = tl.exp2(b_max - b_shift), tl.exp2(b_old_max - b_shift)
        b_max, b_sum = b_new, b_sum * b_decay + b_old_sum * b_old_decay
        b_old_total = load_rows(p_total + i_flat * D, D, o_row, count, D, BLOCK_D)
        b_total = b_total * b_decay[:, None] + b_old_total * b_old_decay[:, None]
    m_row = o_row < count
    if LAST:
        b_divisor = tl.where(b_sum == 0.0, 1.0, b_sum)  # rows that saw nothing: out 0, lse -inf
        b_out = b_total / b_divisor[:, None]
        p_out += ((i_b * q_chunks * q_length + i_token) * heads + i_h) * D  # [B, Tq, H, d]
        store_rows(p_out, heads * D, o_row, count, b_out, D, BLOCK_D)
        tl.store(p_lse + i_flat + o_row, (b_max + tl.log2(b_divisor)) / LOG2E, m_row)
    else:
        store_rows(p_total + i_flat * D, D, o_row, count, b_total, D, BLOCK_D)
        tl.store(p_max + i_flat + o_row, b_max, m_row)
        tl.store(p_sum + i_flat + o_row, b_sum, m_row)


@triton.jit
def _attend(
    b_total, b_max, b_sum, b_q, p_k, p_v, k_t, v_t, i_first, count, is_full, o_low, o_high, scale,
    KEYS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One block of `count` keys, from the chunk's token i_first on; each row sees o_low..o_high-1."""
    o_key = tl.arange(0, KEYS)
    b_k = load_rows(p_k, k_t, o_key, count, D, BLOCK_D)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
    if not is_full:
        b_s = tl.where(between(i_first + o_key, o_low, o_high), b_s, float("-inf"))
    b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale)
    b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)  # a row may have seen nothing yet
    b_p = tl.exp2(b_s * scale - b_shift[:, None])
    b_decay = tl.exp2(b_max - b_shift)
    b_sum = b_sum * b_decay + tl.sum(b_p, 1)
    b_v = load_rows(p_v, v_t, o_key, count, D, BLOCK_D)
    b_total = tl.dot(b_p.to(b_v.dtype), b_v, b_total * b_decay[:, None], input_precision="ieee")
    return b_total, b_new, b_sum


def variants(target: str) -> Iterator[Variant]:
    """Every kernel of attention with every config of a chip, as custom_ops.py launches it in bf16."""
    pointers = dict(p_q="*bf16", p_k="*bf16", p_v="*bf16", p_q_starts="*i64", p_k_starts="*i64")
    state = dict(p_total="*fp32", p_max="*fp32", p_sum="*fp32")
    results = dict(p_out="*bf16", p_lse="*fp32")
    steps = dict(single=(True, True), first=(True, False), middle=(False, False), last=(False, True))
    for width in WIDTHS:
        for config, is_default in defaults_first(table(TABLES, width, 2)[target]):
            for (name, (first, last)), documents in product(steps.items(), (False, True)):
                # Of the other configs: the simplest, and the one with the most to hold.
                if not is_default and (name, documents) not in (("single", False), ("middle", True)):
                    continue
                constants = dict(sizes(width), DOCUMENTS=documents, FIRST=first, LAST=last)
                types = dict(pointers, p_q_first="*i64")
                absent = [] if documents else ["p_q_first"]
                absent += list(state) if first and last else []
                absent += [] if last else list(results)
                types |= state | results
                label = f"attention/forward/{width}/{name}" + "/documents" * documents
                constants |= dict.fromkeys(absent)
                yield variant(forward_kernel, label, types, constants, config)
    yield from triton_backward.variants(target)
