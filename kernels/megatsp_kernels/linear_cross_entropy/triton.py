"""Linear cross-entropy's kernels: the log-sum-exp of logits that stay in registers, and the gradients.

All multiply matrices by `_product`, whose operands lie either way round: offsets inside a tile are int32
(for a row stride below 2^23 elements), the tile's own place is int64.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import triton
import triton.language as tl

from megatsp_kernels.aot import Variant
from megatsp_kernels.common import Config

# GROUP: so many row blocks go through the same columns next to each other, and share them in the L2
# cache. XCDS: the chip's dies, over which its scheduler deals programs out in turn. PARTS: into how many a
# tile is cut when it is summed or stored, where it would spill as a whole.
_AMD = dict(GROUP=4, XCDS=8, PARTS=1)
_NVIDIA = dict(GROUP=8, XCDS=1, PARTS=1)
_MFMA = dict(matrix_instr_nonkdim=16, kpack=2, waves_per_eu=0)
_MFMA_950 = _MFMA | dict(kpack=1)

# fp16 and bf16. AMD: the largest tile of which the online sum spills nothing (256 x 256 spills 60 to 400
# registers); then one of which two programs fit a compute unit, for few rows. sm_90: 64x256 wgmma by two
# warpgroups; then half of it, for few rows.
TABLE = {
    "gfx942": [
        Config(dict(M=256, N=128, K=64) | _AMD, num_warps=8, amd=_MFMA),
        Config(dict(M=128, N=128, K=64) | _AMD, num_warps=4, amd=_MFMA),
    ],
    "gfx950": [
        Config(dict(M=256, N=128, K=64) | _AMD, num_warps=8, amd=_MFMA_950),
        Config(dict(M=128, N=128, K=64) | _AMD, num_warps=4, amd=_MFMA_950),
    ],
    "sm_90": [
        Config(dict(M=128, N=256, K=64) | _NVIDIA | dict(PARTS=4), num_warps=8, num_stages=3),
        Config(dict(M=128, N=128, K=64) | _NVIDIA, num_warps=8, num_stages=4),
    ],
    "interpreter": [Config(dict(M=16, N=16, K=16, GROUP=2, XCDS=2, PARTS=4))],
}
# The gradients' products, with less beside the tile: 256 x 256 fits too, at K = 32. Adding a whole tile to
# what is at odd addresses would take 128 KiB of LDS: hence parts.
_AMD_PARTS = _AMD | dict(PARTS=4)
GRADIENT_TABLE = {
    "gfx942": [
        Config(dict(M=256, N=128, K=64) | _AMD_PARTS, num_warps=8, amd=_MFMA),
        Config(dict(M=256, N=256, K=32) | _AMD_PARTS, num_warps=8, amd=_MFMA | dict(kpack=1)),
    ],
    "gfx950": [
        Config(dict(M=256, N=128, K=64) | _AMD_PARTS, num_warps=8, amd=_MFMA_950),
        Config(dict(M=256, N=256, K=32) | _AMD_PARTS, num_warps=8, num_stages=3, amd=_MFMA_950),
    ],
    "sm_90": TABLE["sm_90"],
    "interpreter": TABLE["interpreter"],
}
# fp32 without shortcuts through lower precision: for tests and small models, not for speed.
TABLE_FP32 = {
    "gfx942": [Config(dict(M=64, N=64, K=32) | _AMD, num_warps=4, amd=_MFMA)],
    "gfx950": [Config(dict(M=64, N=64, K=32) | _AMD, num_warps=4, amd=_MFMA_950)],
    "sm_90": [Config(dict(M=64, N=64, K=32) | _NVIDIA, num_warps=8)],
    "interpreter": [Config(dict(M=16, N=16, K=16, GROUP=2, XCDS=1, PARTS=1))],
}
# Bound by memory and small: a wavefront a program, so that there are enough of them.
COMBINE_TABLE = {
    "gfx942": [Config(dict(ROWS=64), num_warps=1)],
    "gfx950": [Config(dict(ROWS=64), num_warps=1)],
    "sm_90": [Config(dict(ROWS=32), num_warps=1)],
    "interpreter": [Config(dict(ROWS=16))],
}
# Programs that run at once: one a compute unit. Not asked of the device, so that a part of a chip gives the
# same bits as the whole.
AT_ONCE = {"gfx942": 304, "gfx950": 256, "sm_90": 132, "interpreter": 6}


@triton.jit
def _place(row_blocks, others, GROUP: tl.constexpr, XCDS: tl.constexpr):
    """This program's row block, and its block of `others`."""
    i = tl.program_id(0)
    if XCDS > 1:  # neighbours on one die: its k-th program takes the k-th place of a range of its own
        count = row_blocks * others
        die, share, longer = i % XCDS, count // XCDS, count % XCDS
        i = i // XCDS + die * share + tl.minimum(die, longer)
    group = i // (GROUP * others)
    height = tl.minimum(row_blocks - group * GROUP, GROUP)
    i = i % (GROUP * others)
    return group * GROUP + i % height, i // height


@triton.jit
def _product(
    p_a, p_b, stride_am, stride_ak, stride_bk, stride_bn, i_m, i_n, rows, columns, depth,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """A tile [M, N] of a [rows, depth] times b [depth, columns], in fp32. EVEN: K divides depth."""
    o_m, o_n, o_k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    m_a = (o_m < rows - i_m * M)[:, None]
    m_b = (o_n < columns - i_n * N)[None, :]
    p_a += i_m.to(tl.int64) * M * stride_am
    p_b += i_n.to(tl.int64) * N * stride_bn
    o_a = o_m[:, None] * stride_am + o_k[None, :] * stride_ak
    o_b = o_k[:, None] * stride_bk + o_n[None, :] * stride_bn
    b_sum = tl.zeros([M, N], tl.float32)
    for k in range(0, depth, K):
        if EVEN:
            b_a = tl.load(p_a + o_a, m_a, other=0.0)
            b_b = tl.load(p_b + o_b, m_b, other=0.0)
        else:
            b_a = tl.load(p_a + o_a, m_a & (o_k < depth - k)[None, :], other=0.0)
            b_b = tl.load(p_b + o_b, m_b & (o_k < depth - k)[:, None], other=0.0)
        b_sum = tl.dot(b_a, b_b, b_sum, input_precision="ieee")
        p_a += K * stride_ak
        p_b += K * stride_bk
    return b_sum


@triton.jit
def _halves(b, M: tl.constexpr, N: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(b, (M, 2, N // 2)), (0, 2, 1)))


@triton.jit
def _parts(b, M: tl.constexpr, N: tl.constexpr, PARTS: tl.constexpr):
    """A tile as 1 or 4 parts [M, N / PARTS]: one after the other, four need fewer registers."""
    tl.static_assert(PARTS == 1 or PARTS == 4)
    if PARTS == 1:
        parts = (b,)
    else:
        b_left, b_right = _halves(b, M, N)
        parts = _halves(b_left, M, N // 2) + _halves(b_right, M, N // 2)
    return parts


@triton.jit
def _store(
    p_out, b_out, i_m, i_n, rows, columns, stride, M: tl.constexpr, N: tl.constexpr, ADD: tl.constexpr
):  # fmt: skip
    """Writes a tile [M, N] of out [rows, columns], or with ADD adds it to what is there."""
    o_m, o_n = tl.arange(0, M), tl.arange(0, N)
    m = (o_m < rows - i_m * M)[:, None] & (o_n < columns - i_n * N)[None, :]
    p = p_out + i_m.to(tl.int64) * M * stride + i_n * N + (o_m[:, None] * stride + o_n[None, :])
    if ADD:
        b_out += tl.load(p, m, other=0.0)
    tl.store(p, b_out.to(p_out.dtype.element_ty), m)


@triton.jit
def _target_columns(p_targets, o_row, m_row, start, columns):
    """The column of each row's target, int32; -1 where it is none of these columns."""
    b_target = tl.load(p_targets + o_row, m_row, other=-1) - start
    return tl.where((b_target >= 0) & (b_target < columns), b_target, -1).to(tl.int32)


@triton.jit
def _online(b_max, b_sum, b_hit, b_logits, b_target, i_n, columns, N: tl.constexpr):
    o_column = i_n * N + tl.arange(0, N)
    hit = o_column[None, :] == b_target[:, None]
    b_hit += tl.sum(tl.where(hit, b_logits, 0.0), 1)
    if (i_n + 1) * N > columns:
        b_logits = tl.where((o_column < columns)[None, :], b_logits, float("-inf"))
    b_new = tl.maximum(b_max, tl.max(b_logits, 1))
    b_sum = b_sum * tl.exp(b_max - b_new) + tl.sum(tl.exp(b_logits - b_new[:, None]), 1)
    return b_new, b_sum, b_hit


@triton.jit(do_not_specialize=["start", "splits", "split_blocks"])
def forward_kernel(
    p_x, p_w, p_targets, p_max, p_sum, p_target_logit, start, rows, columns, depth,
    stride_wh, stride_wm, splits, split_blocks,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, XCDS: tl.constexpr,
    PARTS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Rows of x w, a split of `split_blocks` blocks of columns: their maximum and sum of exponentials.

    p_max, p_sum: [splits, rows]. The one program that meets a row's target writes its logit.
    """
    i_m, i_split = _place(tl.cdiv(rows, M), splits, GROUP, XCDS)
    o_row = i_m * M + tl.arange(0, M)
    m_row = o_row < rows
    b_target = _target_columns(p_targets, o_row, m_row, start, columns)
    b_max = tl.full([M], float("-inf"), tl.float32)
    b_sum = tl.zeros([M], tl.float32)
    b_hit = tl.zeros([M], tl.float32)
    first = i_split * split_blocks
    last = tl.minimum(first + split_blocks, tl.cdiv(columns, N))
    for i_block in tl.range(0, last - first, disable_licm=True):  # what it would move out would spill
        i_n = first + i_block
        b_logits = _product(
            p_x, p_w, depth, 1, stride_wh, stride_wm, i_m, i_n, rows, columns, depth, M, N, K, EVEN
        )
        b_parts = _parts(b_logits, M, N, PARTS)
        for i in tl.static_range(PARTS):
            i_part = i_n * PARTS + i
            b_max, b_sum, b_hit = _online(
                b_max, b_sum, b_hit, b_parts[i], b_target, i_part, columns, N // PARTS
            )
    o_split = i_split.to(tl.int64) * rows
    tl.store(p_max + o_split + o_row, b_max, m_row)
    tl.store(p_sum + o_split + o_row, b_sum, m_row)
    met = (b_target >= first * N) & (b_target < last * N)
    tl.store(p_target_logit + o_row, b_hit, m_row & met)


@triton.jit(do_not_specialize=["splits"])
def combine_kernel(p_max, p_sum, p_lse, rows, splits, ROWS: tl.constexpr):
    """lse becomes its logaddexp with the splits' own, in their order."""
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < rows
    b_max = tl.load(p_lse + o_row, m_row, other=0.0)
    b_sum = tl.full([ROWS], 1.0, tl.float32)
    o_partial = o_row
    for _ in range(splits):
        b_other = tl.load(p_max + o_partial, m_row, other=0.0)
        b_new = tl.maximum(b_max, b_other)
        b_sum = b_sum * tl.exp(b_max - b_new) + tl.load(p_sum + o_partial, m_row, other=0.0) * tl.exp(
            b_other - b_new
        )
        b_max = b_new
        o_partial += rows
    tl.store(p_lse + o_row, b_max + tl.log(b_sum), m_row)


@triton.jit
def _dlogits(b_logits, i_n, b_target, b_lse, b_a, b_b, N: tl.constexpr):
    b_dlogits = b_a[:, None] * tl.exp(b_logits - b_lse[:, None])
    hit = tl.arange(0, N)[None, :] == (b_target - i_n * N)[:, None]
    return b_dlogits - tl.where(hit, b_b[:, None], 0.0)


@triton.jit(do_not_specialize=["start"])
def dlogits_kernel(
    p_x, p_w, p_targets, p_lse, p_softmax_scale, p_target_scale, p_dlogits, start, rows, columns, depth,
    stride_wh, stride_wm, stride_d,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, XCDS: tl.constexpr,
    PARTS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """dlogits [rows, columns] = a softmax - b one_hot(target), of a tile of logits computed again."""
    i_m, i_n = _place(tl.cdiv(rows, M), tl.cdiv(columns, N), GROUP, XCDS)
    b_logits = _product(
        p_x, p_w, depth, 1, stride_wh, stride_wm, i_m, i_n, rows, columns, depth, M, N, K, EVEN
    )
    o_row = i_m * M + tl.arange(0, M)
    m_row = o_row < rows
    b_target = _target_columns(p_targets, o_row, m_row, start, columns)
    b_a = tl.load(p_softmax_scale + o_row, m_row, other=0.0)
    # Without a weight, a softmax of exactly 0: also where lse is none.
    b_lse = tl.where(b_a == 0.0, float("inf"), tl.load(p_lse + o_row, m_row, other=0.0))
    b_b = tl.load(p_target_scale + o_row, m_row, other=0.0)
    b_parts = _parts(b_logits, M, N, PARTS)
    for i in tl.static_range(PARTS):
        i_part = i_n * PARTS + i
        b_dlogits = _dlogits(b_parts[i], i_part, b_target, b_lse, b_a, b_b, N // PARTS)
        _store(p_dlogits, b_dlogits, i_m, i_part, rows, columns, stride_d, M, N // PARTS, False)


@triton.jit
def product_kernel(
    p_a, p_b, p_out, rows, columns, depth, stride_am, stride_ak, stride_bk, stride_bn, stride_out,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, XCDS: tl.constexpr,
    PARTS: tl.constexpr, EVEN: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """out [rows, columns] = a [rows, depth] times b [depth, columns], or with ADD becomes so much more."""
    i_m, i_n = _place(tl.cdiv(rows, M), tl.cdiv(columns, N), GROUP, XCDS)
    b_out = _product(
        p_a, p_b, stride_am, stride_ak, stride_bk, stride_bn, i_m, i_n, rows, columns, depth, M, N, K, EVEN
    )
    b_parts = _parts(b_out, M, N, PARTS)
    for i in tl.static_range(PARTS):
        i_part = i_n * PARTS + i
        _store(p_out, b_parts[i], i_m, i_part, rows, columns, stride_out, M, N // PARTS, ADD)


# Whether no depth is masked, and which stride of the weight is 1.
_FORMS = [(even, one) for even in (False, True) for one in ("stride_wm", "stride_wh")]


def variants(target: str) -> Iterator[Variant]:
    """Every kernel of this file with every config of a chip, as op.py launches it in bf16 and in fp32.

    Weights and their gradients lie both ways round; a depth that K does not divide is masked.
    """
    for dtype, forward, gradient in (
        ("*bf16", TABLE, GRADIENT_TABLE),
        ("*fp32", TABLE_FP32, TABLE_FP32),
    ):
        # bf16 with the config in use, in every form; others, and fp32, in the one that holds most.
        for i, config in enumerate(forward[target]):
            for even, one in _FORMS if dtype == "*bf16" and i == 0 else _FORMS[:1]:
                yield _forward_variant(config, dtype, even, one)
        for i, config in enumerate(gradient[target]):
            every = dtype == "*bf16" and i == 0
            for even, one in _FORMS if every else _FORMS[:1]:
                yield _dlogits_variant(config, dtype, even, one)
            for even in (False, True) if every else (False,):
                yield from _product_variants(config, dtype, even, every)
    for config in COMBINE_TABLE[target]:
        signature = dict(p_max="*fp32", p_sum="*fp32", p_lse="*fp32", rows="i32", splits="i32")
        yield Variant(combine_kernel, "linear_cross_entropy/combine", signature, {}, config, ("rows",))


def _forward_variant(config: Config, dtype: str, even: bool, one: str) -> Variant:
    signature = dict(
        p_x=dtype, p_w=dtype, p_targets="*i64", p_max="*fp32", p_sum="*fp32", p_target_logit="*fp32",
        start="i32", rows="i32", columns="i32", depth="i32", stride_wh="i32", stride_wm="i32",
        splits="i32", split_blocks="i32",
    )  # fmt: skip
    aligned = ("rows", "columns", "depth", "stride_wh", "stride_wm")
    return _variant(forward_kernel, "forward", signature, aligned, {one: 1, "EVEN": even}, config)


def _dlogits_variant(config: Config, dtype: str, even: bool, one: str) -> Variant:
    signature = dict(
        p_x=dtype, p_w=dtype, p_targets="*i64", p_lse="*fp32", p_softmax_scale="*fp32",
        p_target_scale="*fp32", p_dlogits=dtype, start="i32", rows="i32", columns="i32", depth="i32",
        stride_wh="i32", stride_wm="i32", stride_d="i32",
    )  # fmt: skip
    aligned = ("rows", "columns", "depth", "stride_wh", "stride_wm", "stride_d")
    return _variant(dlogits_kernel, "dlogits", signature, aligned, {one: 1, "EVEN": even}, config)


def _product_variants(config: Config, dtype: str, even: bool, every: bool) -> Iterator[Variant]:
    """dx, added to or not, of weights either way round; dw in fp32 or not. Unless `every`: added, in fp32."""
    sizes = ("rows", "columns", "depth", "stride_am", "stride_ak", "stride_bk", "stride_bn", "stride_out")
    for label, ones, out, add in (
        ("dx", ("stride_ak", "stride_bk"), "*fp32", True),
        ("dx", ("stride_ak", "stride_bk"), "*fp32", False),
        ("dx", ("stride_ak", "stride_bn"), "*fp32", True),
        ("dx", ("stride_ak", "stride_bn"), "*fp32", False),
        ("dw", ("stride_am", "stride_bn"), dtype, False),
        ("dw", ("stride_am", "stride_bn"), "*fp32", False),
    ):
        if not every and (out != "*fp32" or add != (label == "dx") or "stride_bn" not in ones):
            continue
        signature = dict(p_a=dtype, p_b=dtype, p_out=out) | dict.fromkeys(sizes, "i32")
        constants = dict.fromkeys(ones, 1) | dict(EVEN=even, ADD=add)
        yield _variant(product_kernel, label, signature, sizes, constants, config)


def _variant(
    kernel: Any,
    label: str,
    signature: Mapping[str, str],
    aligned: Sequence[str],
    constants: Mapping[str, Any],
    config: Config,
) -> Variant:
    """Without the constants in the signature: Triton makes a stride of 1 one by itself."""
    return Variant(
        kernel,
        f"linear_cross_entropy/{label}",
        {name: kind for name, kind in signature.items() if name not in constants},
        constants,
        config,
        tuple(name for name in aligned if name not in constants),
        matrix="*bf16" in signature.values(),
    )
