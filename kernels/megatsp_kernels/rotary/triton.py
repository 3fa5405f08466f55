"""Rotary position embedding, a tile of tokens and several heads a program."""

from collections.abc import Iterator
from itertools import product

import triton
import triton.language as tl

from megatsp_kernels.aot import Variant
from megatsp_kernels.common import Config

# Bound by memory. TILE: pairs of one head a program, 8 a lane, so that both halves are loads of 16
# bytes in bf16 (16 pairs a lane with 4 warps on sm_90). HEADS: that share one reading of the angles,
# which in fp32 are as many bytes as a head in bf16; the second config trades that for twice the programs.
TABLE = {
    "gfx942": [
        Config(dict(TILE=2048, HEADS=4), num_warps=4),
        Config(dict(TILE=2048, HEADS=2), num_warps=4),
    ],
    "gfx950": [Config(dict(TILE=2048, HEADS=4), num_warps=4)],
    "sm_90": [
        Config(dict(TILE=2048, HEADS=4), num_warps=8),
        Config(dict(TILE=2048, HEADS=4), num_warps=4),
    ],
    "interpreter": [Config(dict(TILE=16, HEADS=2))],
}


@triton.jit
def rotate_kernel(
    p_x, p_cos, p_sin, p_out, rows, heads, tokens,
    x_batch_stride, x_head_stride, x_token_stride, out_batch_stride, out_head_stride, out_token_stride,
    PAIRS: tl.constexpr, WIDTH: tl.constexpr, INVERSE: tl.constexpr, SAMPLES: tl.constexpr,
    TILE: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """rows: B H. p_out may be p_x: a program reads what it writes, and nothing else. WIDTH: PAIRS padded.

    SAMPLES: each has a table of its own, so a program's rows are of one.
    """
    TOKENS: tl.constexpr = TILE // WIDTH if TILE > WIDTH else 1
    i_first, end = tl.program_id(1) * HEADS, rows
    if SAMPLES:
        num_blocks = tl.cdiv(heads, HEADS)
        i_sample = tl.program_id(1) // num_blocks
        i_first, end = i_sample * heads + tl.program_id(1) % num_blocks * HEADS, (i_sample + 1) * heads
        p_cos += i_sample.to(tl.int64) * tokens * PAIRS
        p_sin += i_sample.to(tl.int64) * tokens * PAIRS
    o_token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[:, None]
    o_pair = tl.arange(0, WIDTH)[None, :]
    m = (o_token < tokens) & (o_pair < PAIRS)
    o_table = o_token.to(tl.int64) * PAIRS + o_pair
    b_cos = tl.load(p_cos + o_table, m, other=0.0)
    b_sin = tl.load(p_sin + o_table, m, other=0.0)
    if INVERSE:
        b_sin = -b_sin
    o_x = o_token.to(tl.int64) * x_token_stride + o_pair
    o_out = o_token.to(tl.int64) * out_token_stride + o_pair
    for i in tl.static_range(HEADS):
        i_row = i_first + i
        i_batch, i_head = (i_row // heads).to(tl.int64), (i_row % heads).to(tl.int64)
        p_first = p_x + i_batch * x_batch_stride + i_head * x_head_stride + o_x
        m_row = (o_token < tl.where(i_row < end, tokens, 0)) & (o_pair < PAIRS)
        b_first = tl.load(p_first, m_row, other=0.0).to(tl.float32)
        b_second = tl.load(p_first + PAIRS, m_row, other=0.0).to(tl.float32)
        b_out_first = b_first * b_cos - b_second * b_sin
        b_out_second = b_second * b_cos + b_first * b_sin
        p_out_first = p_out + i_batch * out_batch_stride + i_head * out_head_stride + o_out
        tl.store(p_out_first, b_out_first.to(p_out.dtype.element_ty), m_row)
        tl.store(p_out_first + PAIRS, b_out_second.to(p_out.dtype.element_ty), m_row)


def variants(target: str) -> Iterator[Variant]:
    """The kernel with every config of a chip, on bf16 heads of 128 and fp32 gradients of theirs.

    A table for each sample with the config that is used.
    """
    sizes = dict(rows="i32", heads="i32", tokens="i32")
    strides = {f"{name}_{dim}_stride": "i32" for name in ("x", "out") for dim in ("batch", "head", "token")}
    for i, config in enumerate(TABLE[target]):
        for (dtype, inverse), samples in product((("*bf16", False), ("*fp32", True)), (False, True)):
            if samples and i:
                continue
            signature = dict(p_x=dtype, p_cos="*fp32", p_sin="*fp32", p_out="*bf16") | sizes | strides
            constants = dict(PAIRS=64, WIDTH=64, INVERSE=inverse, SAMPLES=samples)
            label = f"rotary/{'backward' if inverse else 'forward'}" + "/samples" * samples
            yield Variant(rotate_kernel, label, signature, constants, config, tuple(strides))
