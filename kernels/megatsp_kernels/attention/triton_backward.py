"""Flash attention backward: one kernel for the queries' gradient, one for the keys' and values'.

Each program owns what it writes: no atomics, so the same bits every time. Both recompute the scores,
seven products of blocks in place of five.

Source: Dao, FlashAttention-2, arXiv:2307.08691, algorithm 2.
"""

from collections.abc import Iterator
from itertools import product

import triton
import triton.language as tl

from megatsp_kernels.aot import Variant
from megatsp_kernels.attention.triton_blocks import (
    LOG2E,
    WIDTHS,
    between,
    count_at_most,
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
_CDNA_32 = dict(waves_per_eu=2, matrix_instr_nonkdim=32)  # fewer registers hold the operands
_CDNA_1 = dict(waves_per_eu=1, matrix_instr_nonkdim=16)  # one wave a SIMD, with 512 registers
_CDNA_1_32 = dict(waves_per_eu=1, matrix_instr_nonkdim=32)
_INTERPRETER = [Config(dict(QUERIES=8, KEYS=16))]
# dk and dv of a block are held beside its k and v: 128 keys, and few queries at a time. Where a row is 512
# bytes that leaves 32 keys on sm_90, too few for wgmma: it runs mma.sync.
_AMD_KEYS_128 = [Config(dict(QUERIES=32, KEYS=128), num_warps=4, num_stages=1, amd=_CDNA)]
_AMD_KEYS_256 = [
    Config(dict(QUERIES=32, KEYS=128), num_warps=8, num_stages=1, amd=_CDNA),
    # 32 keys a warp: half as much is read from LDS, by half as many waves.
    Config(dict(QUERIES=32, KEYS=128), num_warps=4, num_stages=1, amd=_CDNA_1_32),
]
_AMD_KEYS_512 = [
    Config(dict(QUERIES=16, KEYS=64), num_warps=4, num_stages=1, amd=_CDNA_1),
    Config(dict(QUERIES=32, KEYS=32), num_warps=4, num_stages=1, amd=_CDNA_1),  # fewer, longer steps
]
_AMD_QUERIES_128 = [Config(dict(QUERIES=128, KEYS=32), num_warps=4, num_stages=1, amd=_CDNA)]
_AMD_QUERIES_256 = [
    Config(dict(QUERIES=128, KEYS=32), num_warps=4, num_stages=1, amd=_CDNA_32),
]
_AMD_QUERIES_512 = [
    Config(dict(QUERIES=64, KEYS=16), num_warps=4, num_stages=1, amd=_CDNA),
    Config(dict(QUERIES=64, KEYS=32), num_warps=4, num_stages=1, amd=_CDNA_1),  # fewer, longer steps
]
# By the bytes of a row.
KEYS_TABLES: dict[int, Table] = {
    128: {
        "gfx942": _AMD_KEYS_128,
        "gfx950": _AMD_KEYS_128,
        "sm_90": [Config(dict(QUERIES=64, KEYS=128), num_warps=8, num_stages=2)],
        "interpreter": _INTERPRETER,
    },
    240: {  # padded to 256: on sm_90 the masks of the padding take the registers of half the keys
        "gfx942": _AMD_KEYS_256,
        "gfx950": _AMD_KEYS_256,
        "sm_90": [Config(dict(QUERIES=32, KEYS=64), num_warps=8, num_stages=2)],
        "interpreter": _INTERPRETER,
    },
    256: {
        "gfx942": _AMD_KEYS_256,
        "gfx950": _AMD_KEYS_256,
        "sm_90": [Config(dict(QUERIES=32, KEYS=128), num_warps=8, num_stages=2)],
        "interpreter": _INTERPRETER,
    },
    512: {
        "gfx942": _AMD_KEYS_512,
        "gfx950": _AMD_KEYS_512,
        "sm_90": [Config(dict(QUERIES=32, KEYS=32), num_warps=8, num_stages=2)],
        "interpreter": _INTERPRETER,
    },
}
QUERIES_TABLES: dict[int, Table] = {
    128: {
        "gfx942": _AMD_QUERIES_128,
        "gfx950": _AMD_QUERIES_128,
        "sm_90": [Config(dict(QUERIES=128, KEYS=64), num_warps=8, num_stages=3)],
        "interpreter": _INTERPRETER,
    },
    256: {
        "gfx942": _AMD_QUERIES_256,
        "gfx950": _AMD_QUERIES_256,
        "sm_90": [Config(dict(QUERIES=128, KEYS=64), num_warps=8, num_stages=2)],
        "interpreter": _INTERPRETER,
    },
    512: {
        "gfx942": _AMD_QUERIES_512,
        "gfx950": _AMD_QUERIES_512,
        "sm_90": [Config(dict(QUERIES=64, KEYS=32), num_warps=8, num_stages=2)],
        "interpreter": _INTERPRETER,
    },
}
# Bound by memory: a row of bf16 of width 128 is 16 lanes' loads of 16 bytes.
DELTA_TABLE: Table = {
    "gfx942": [Config(dict(QUERIES=16), num_warps=4, num_stages=1)],
    "gfx950": [Config(dict(QUERIES=16), num_warps=4, num_stages=1)],
    "sm_90": [Config(dict(QUERIES=16), num_warps=4, num_stages=1)],
    "interpreter": [Config(dict(QUERIES=16))],
}


@triton.jit
def delta_kernel(
    p_out, p_dout, p_delta, out_b, out_h, out_t, dout_b, dout_h, dout_t, heads, length,
    QUERIES: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    num_blocks = tl.cdiv(length, QUERIES)
    i_row = (tl.program_id(0) % num_blocks).to(tl.int64) * QUERIES
    i_bh = (tl.program_id(0) // num_blocks).to(tl.int64)
    i_b, i_h = i_bh // heads, i_bh % heads
    o_row = tl.arange(0, QUERIES)
    count = tl.minimum(length - i_row, QUERIES)
    b_out = load_rows(p_out + i_b * out_b + i_h * out_h + i_row * out_t, out_t, o_row, count, D, BLOCK_D)
    p_dout += i_b * dout_b + i_h * dout_h + i_row * dout_t
    b_dout = load_rows(p_dout, dout_t, o_row, count, D, BLOCK_D)
    b_delta = tl.sum(b_out.to(tl.float32) * b_dout.to(tl.float32), 1)
    tl.store(p_delta + i_bh * length + i_row + o_row, b_delta, o_row < count)


@triton.jit
def _base_2(b_lse):
    """+inf, so that every weight is 0, for rows that saw nothing."""
    return tl.where(b_lse == float("-inf"), float("inf"), b_lse * LOG2E)


@triton.jit
def queries_kernel(
    p_dout, p_q, p_k, p_v, p_lse, p_delta, p_q_starts, p_k_starts, p_q_first, p_dq,
    dout_b, dout_h, dout_t, q_b, q_h, q_t, k_s, k_b, k_h, k_t, v_s, v_b, v_h, v_t, dq_b, dq_h, dq_t, first_b,
    batch, heads, kv_heads, q_chunks, q_length, shards, k_chunks, k_length, scale,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    DOCUMENTS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """dq of a block of queries; ADD: to what is there."""
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
    p_dout += i_b * dout_b + i_h * dout_h + i_token * dout_t
    b_dout = load_rows(p_dout, dout_t, o_row, count, D, BLOCK_D)
    b_lse = _base_2(tl.load(p_lse + i_flat + o_clamped))
    b_delta = tl.load(p_delta + i_flat + o_clamped)
    first_low, first_high, o_first = 0, 0, o_row * 0
    if DOCUMENTS:
        p_first = p_q_first + i_b * first_b + i_token
        first_low = tl.load(p_first).to(tl.int32)
        first_high = tl.load(p_first + count - 1).to(tl.int32)
        o_first = tl.load(p_first + o_clamped).to(tl.int32)

    b_dq = tl.zeros([QUERIES, BLOCK_D], tl.float32)
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
                b_dq = _add_dq(
                    b_dq, b_q, b_dout, b_lse, b_delta, p_k_block, p_v_block, k_t, v_t, i_first,
                    high - i_first, is_full, o_low, o_high, scale, KEYS, D, BLOCK_D,
                )  # fmt: skip
                p_k_block += tl.cast(k_t, tl.int64) * KEYS
                p_v_block += tl.cast(v_t, tl.int64) * KEYS

    p_dq += i_b * dq_b + i_h * dq_h + i_token * dq_t
    b_dq *= scale
    if ADD:
        b_dq += load_rows(p_dq, dq_t, o_row, count, D, BLOCK_D)
    store_rows(p_dq, dq_t, o_row, count, b_dq, D, BLOCK_D)


@triton.jit
def _add_dq(
    b_dq, b_q, b_dout, b_lse, b_delta, p_k, p_v, k_t, v_t, i_first, count, is_full, o_low, o_high, scale,
    KEYS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What one block of `count` keys, from the chunk's token i_first on, adds to dq / scale."""
    o_key = tl.arange(0, KEYS)
    b_k = load_rows(p_k, k_t, o_key, count, D, BLOCK_D)
    b_v = load_rows(p_v, v_t, o_key, count, D, BLOCK_D)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
    if not is_full:
        b_s = tl.where(between(i_first + o_key, o_low, o_high), b_s, float("-inf"))
    b_p = tl.exp2(b_s * (scale * LOG2E) - b_lse[:, None])
    b_dp = tl.dot(b_dout, tl.trans(b_v), input_precision="ieee")
    b_ds = b_p * (b_dp - b_delta[:, None])
    return tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")


@triton.jit
def keys_kernel(
    p_dout, p_q, p_k, p_v, p_lse, p_delta, p_q_starts, p_k_starts, p_q_first, p_dk, p_dv,
    dout_b, dout_h, dout_t, q_b, q_h, q_t, k_s, k_b, k_h, k_t, v_s, v_b, v_h, v_t,
    dk_s, dk_b, dk_h, dk_t, dv_s, dv_b, dv_h, dv_t, first_b,
    batch, heads, kv_heads, q_chunks, q_length, shards, k_chunks, k_length, scale,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    DOCUMENTS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """dk and dv of a block of keys, summed over the query heads that share it; ADD: to what is there."""
    num_blocks = tl.cdiv(k_length, KEYS)
    group = heads // kv_heads
    i_group, i_item = program(tl.program_id(0), batch * kv_heads, shards * k_chunks * num_blocks)
    i_b, i_kv = (i_group // kv_heads).to(tl.int64), (i_group % kv_heads).to(tl.int64)
    # The first keys are seen by most: the shards' first chunks go first, then their second ones.
    i_chunk, i_shard = i_item // (num_blocks * shards), i_item // num_blocks % shards
    i_key = i_item % num_blocks * KEYS
    i_token, i_shard_wide = (i_chunk * k_length + i_key).to(tl.int64), i_shard.to(tl.int64)

    count = tl.minimum(k_length - i_key, KEYS)
    o_key = tl.arange(0, KEYS)
    start = tl.load(p_k_starts + i_shard * k_chunks + i_chunk).to(tl.int32)
    position = start + i_key
    p_k += i_shard_wide * k_s + i_b * k_b + i_kv * k_h + i_token * k_t
    p_v += i_shard_wide * v_s + i_b * v_b + i_kv * v_h + i_token * v_t
    b_k = load_rows(p_k, k_t, o_key, count, D, BLOCK_D)
    b_v = load_rows(p_v, v_t, o_key, count, D, BLOCK_D)

    b_dk = tl.zeros([KEYS, BLOCK_D], tl.float32)
    b_dv = tl.zeros([KEYS, BLOCK_D], tl.float32)
    num_met = 0
    for i_q in range(q_chunks):
        q_start = tl.load(p_q_starts + i_q).to(tl.int32)
        i_q_token = tl.cast(i_q, tl.int64) * q_length
        o_low, o_high = position - q_start + o_key, o_key * 0 + q_length
        if DOCUMENTS:  # seen by those whose document begins at or before the key
            p_first = p_q_first + i_b * first_b + i_q_token
            o_high = count_at_most(p_first, q_length, position + tl.minimum(o_key, count - 1))
        low = tl.maximum(position - q_start, 0)
        high = tl.where(start < 0, 0, tl.max(o_high, 0))
        full_low, full_high = position + count - 1 - q_start, tl.min(o_high, 0)
        num_blocks = tl.cdiv(tl.maximum(high - low, 0), QUERIES)
        num_met += num_blocks
        for i_g in range(group):
            i_h = i_kv * group + i_g
            i_flat = ((i_b * heads + i_h) * q_chunks + i_q) * q_length
            p_q_chunk = p_q + i_b * q_b + i_h * q_h + i_q_token * q_t
            p_dout_chunk = p_dout + i_b * dout_b + i_h * dout_h + i_q_token * dout_t
            for i in range(num_blocks):
                i_first = low + i * QUERIES
                is_full = (i_first >= full_low) & (i_first + QUERIES <= full_high)
                b_dk, b_dv = _add_dkv(
                    b_dk, b_dv, b_k, b_v, p_dout_chunk, p_q_chunk, p_lse + i_flat, p_delta + i_flat, dout_t,
                    q_t, i_first, high - i_first, is_full, o_low, o_high, scale, QUERIES, D, BLOCK_D,
                )  # fmt: skip

    if num_met > 0 or not ADD:
        p_dk += i_shard_wide * dk_s + i_b * dk_b + i_kv * dk_h + i_token * dk_t
        p_dv += i_shard_wide * dv_s + i_b * dv_b + i_kv * dv_h + i_token * dv_t
        b_dk *= scale
        if ADD:
            b_dk += load_rows(p_dk, dk_t, o_key, count, D, BLOCK_D)
            b_dv += load_rows(p_dv, dv_t, o_key, count, D, BLOCK_D)
        store_rows(p_dk, dk_t, o_key, count, b_dk, D, BLOCK_D)
        store_rows(p_dv, dv_t, o_key, count, b_dv, D, BLOCK_D)


@triton.jit
def _add_dkv(
    b_dk, b_dv, b_k, b_v, p_dout, p_q, p_lse, p_delta, dout_t, q_t, i_first, count, is_full, o_low, o_high,
    scale, QUERIES: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What one block of `count` queries, from the chunk's token i_first on, adds to dk / scale and dv.

    Each key is seen by the queries o_low..o_high-1. Scores are computed as [KEYS, QUERIES]: so they are the
    left operands of what follows, as they lie.
    """
    o_row = tl.arange(0, QUERIES)
    o_clamped = i_first + tl.minimum(o_row, count - 1)
    i_first_wide = i_first.to(tl.int64)
    b_q = load_rows(p_q + i_first_wide * q_t, q_t, o_row, count, D, BLOCK_D)
    b_dout = load_rows(p_dout + i_first_wide * dout_t, dout_t, o_row, count, D, BLOCK_D)
    b_lse, b_delta = _base_2(tl.load(p_lse + o_clamped)), tl.load(p_delta + o_clamped)
    b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")
    if not is_full:
        b_s = tl.where(between(i_first + o_row, o_low, o_high), b_s, float("-inf"))
    b_p = tl.exp2(b_s * (scale * LOG2E) - b_lse[None, :])
    b_dv = tl.dot(b_p.to(b_dout.dtype), b_dout, b_dv, input_precision="ieee")
    b_dp = tl.dot(b_v, tl.trans(b_dout), input_precision="ieee")
    b_ds = b_p * (b_dp - b_delta[None, :])
    b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision="ieee")
    return b_dk, b_dv


def variants(target: str) -> Iterator[Variant]:
    """Every kernel of this file with every config of a chip, as custom_ops.py launches it in bf16."""
    inputs = dict(p_dout="*bf16", p_q="*bf16", p_k="*bf16", p_v="*bf16", p_lse="*fp32", p_delta="*fp32")
    inputs |= dict(p_q_starts="*i64", p_k_starts="*i64", p_q_first="*i64")
    for width in WIDTHS:
        for config in DELTA_TABLE[target]:
            types = dict(p_out="*bf16", p_dout="*bf16", p_delta="*fp32")
            yield variant(delta_kernel, f"attention/delta/{width}", types, sizes(width), config)
        for kernel, name, tables, results in (
            (queries_kernel, "dq", QUERIES_TABLES, dict(p_dq="*fp32")),
            (keys_kernel, "dkdv", KEYS_TABLES, dict(p_dk="*fp32", p_dv="*fp32")),
        ):
            for config, is_default in defaults_first(table(tables, width, 2)[target]):
                for documents, add in product((False, True), (False, True)):
                    if not is_default and documents != add:
                        continue
                    constants = dict(sizes(width), DOCUMENTS=documents, ADD=add)
                    constants |= {} if documents else dict(p_q_first=None)
                    label = f"attention/{name}/{width}" + "/documents" * documents + "/add" * add
                    yield variant(kernel, label, inputs | results, constants, config)
