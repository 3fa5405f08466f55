"""Weight slices published and pulled, products beside a pull, gradients written to their owners and summed.

Pointers into a rank's buffer come from a table int64 [D]; offsets are those of peers/layout.py.
"""

from collections.abc import Iterator

import triton
import triton.language as tl

from megatsp_kernels.aot import Variant
from megatsp_kernels.common import Config
from megatsp_kernels.peers.status import ARRIVED, FREED, PULLED, READY
from megatsp_kernels.peers.triton import at, count, finish, tell, wait

_READY, _PULLED = tl.constexpr(READY), tl.constexpr(PULLED)
_ARRIVED, _FREED = tl.constexpr(ARRIVED), tl.constexpr(FREED)
_LINE = tl.constexpr(128)

_CDNA = dict(matrix_instr_nonkdim=16)
# DRAIN: see peers/triton.py. XCDS: L2s, over which workgroups go round-robin.
_GFX, _SM90 = dict(DRAIN=1, XCDS=8), dict(DRAIN=0, XCDS=1)
# PULLS programs pull, and come first, so that they are resident at once: a tenth of the CUs, whose loads in
# flight (COPY elements each) cover the links' latency. GROUP row tiles share columns in L2.
_PULL_GFX, _PULL_SM90 = dict(PULLS=32, COPY=8192, GROUP=8), dict(PULLS=16, COPY=8192, GROUP=8)
MATMUL = {
    "gfx942": [
        # 64 KiB of LDS: all there is.
        Config(dict(BM=256, BN=256, BK=64, **_PULL_GFX, **_GFX), num_warps=8, amd=_CDNA),
        # Where large tiles do not fill the CUs.
        Config(dict(BM=128, BN=128, BK=64, **_PULL_GFX, **_GFX), num_warps=4, amd=_CDNA),
    ],
    "gfx950": [Config(dict(BM=256, BN=256, BK=64, **_PULL_GFX, **_GFX), num_warps=8, amd=_CDNA)],
    "sm_90": [
        Config(dict(BM=128, BN=256, BK=64, **_PULL_SM90, **_SM90), num_warps=8, num_stages=3),
        Config(dict(BM=128, BN=128, BK=64, **_PULL_SM90, **_SM90), num_warps=4, num_stages=3),
    ],
    "interpreter": [Config(dict(BM=32, BN=32, BK=32, PULLS=1, COPY=64, GROUP=2, XCDS=1, DRAIN=0))],
}
# fp32 without shortcuts through lower precision: for tests and small models, not for speed.
MATMUL_FP32 = {
    "gfx942": [Config(dict(BM=64, BN=64, BK=32, **_PULL_GFX, **_GFX), num_warps=4, amd=_CDNA)],
    "gfx950": [Config(dict(BM=64, BN=64, BK=32, **_PULL_GFX, **_GFX), num_warps=4, amd=_CDNA)],
    "sm_90": [Config(dict(BM=64, BN=64, BK=32, **_PULL_SM90, **_SM90), num_warps=4)],
    "interpreter": MATMUL["interpreter"],
}
# An owner's h/D rows are few: smaller tiles fill the CUs, and leave registers to address the owner.
SCATTER = {
    "gfx942": [
        Config(dict(BM=256, BN=128, BK=64, **_GFX), num_warps=8, amd=_CDNA),
        Config(dict(BM=128, BN=128, BK=64, **_GFX), num_warps=4, amd=_CDNA),
    ],
    "gfx950": [Config(dict(BM=256, BN=128, BK=64, **_GFX), num_warps=8, amd=_CDNA)],
    "sm_90": [
        Config(dict(BM=128, BN=256, BK=64, **_SM90), num_warps=8, num_stages=3),
        Config(dict(BM=128, BN=128, BK=64, **_SM90), num_warps=4, num_stages=3),
    ],
    "interpreter": [Config(dict(BM=32, BN=32, BK=32, XCDS=1, DRAIN=0))],
}
SCATTER_FP32 = {
    "gfx942": [Config(dict(BM=64, BN=64, BK=32, **_GFX), num_warps=4, amd=_CDNA)],
    "gfx950": [Config(dict(BM=64, BN=64, BK=32, **_GFX), num_warps=4, amd=_CDNA)],
    "sm_90": [Config(dict(BM=64, BN=64, BK=32, **_SM90), num_warps=4)],
    "interpreter": SCATTER["interpreter"],
}
# Bound by memory. A tile is transposed on the way where a weight is stored the other way round.
PUBLISH = {
    "gfx942": [Config(dict(ROWS=16, COLUMNS=128, DRAIN=1))],
    "gfx950": [Config(dict(ROWS=16, COLUMNS=128, DRAIN=1))],
    "sm_90": [Config(dict(ROWS=16, COLUMNS=128, DRAIN=0))],
    "interpreter": [Config(dict(ROWS=4, COLUMNS=16, DRAIN=0))],
}
# PROGRAMS sum a bucket, always so many: what they free is counted. One a CU, two an SM.
REDUCE = {
    "gfx942": [Config(dict(ROWS=32, COLUMNS=64, PROGRAMS=304, DRAIN=1))],
    "gfx950": [Config(dict(ROWS=32, COLUMNS=64, PROGRAMS=256, DRAIN=1))],
    "sm_90": [Config(dict(ROWS=32, COLUMNS=64, PROGRAMS=264, DRAIN=0))],
    "interpreter": [Config(dict(ROWS=4, COLUMNS=16, PROGRAMS=2, DRAIN=0))],
}
_FIXED = ["epoch", "target", "me", "max_spins", "first"]


@triton.jit
def _publish_part(
    p_part, width, stride_row, stride_column, p_slot, columns, first, start, stop,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Casts rows [start, stop) of a part's columns into the slot [rows, columns], from column `first`."""
    for i_row in range(start, stop, ROWS):
        o_row = i_row + tl.arange(0, ROWS)[:, None]
        for i_column in range(0, width, COLUMNS):
            o_column = i_column + tl.arange(0, COLUMNS)[None, :]
            m = (o_row < stop) & (o_column < width)
            p = p_part + o_row.to(tl.int64) * stride_row + o_column.to(tl.int64) * stride_column
            b = tl.load(p, m, other=0.0)
            p = p_slot + o_row.to(tl.int64) * columns + (first + o_column)
            tl.store(p, b.to(p_slot.dtype.element_ty), m)


@triton.jit(do_not_specialize=_FIXED)
def publish_kernel(
    p_table, p_status,
    p_part0, p_part1, p_part2, p_part3,
    width0, width1, width2, width3,
    row0, row1, row2, row3,
    column0, column1, column2, column3,
    rows, columns, slot, epoch, me, max_spins, ready, pulled, failed,
    DTYPE: tl.constexpr, PARTS: tl.constexpr, RANKS: tl.constexpr, PIECES: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DRAIN: tl.constexpr,
):  # fmt: skip
    """This rank's columns, side by side and cast, into its slot; program i publishes piece i of the rows."""
    i_piece = tl.program_id(0)
    start, stop = i_piece * rows // PIECES, (i_piece + 1) * rows // PIECES
    # The slot's last use must have been copied by everyone.
    free = wait(
        p_table, p_status, me, 0, RANKS, epoch - 2, max_spins, pulled + i_piece * _LINE, PIECES * _LINE,
        failed, _PULLED,
    )  # fmt: skip
    if free > 0:
        p_slot = at(p_table, me, slot).to(tl.pointer_type(DTYPE))
        _publish_part(p_part0, width0, row0, column0, p_slot, columns, 0, start, stop, ROWS, COLUMNS)
        first = width0
        if PARTS > 1:
            _publish_part(p_part1, width1, row1, column1, p_slot, columns, first, start, stop, ROWS, COLUMNS)
            first += width1
        if PARTS > 2:
            _publish_part(p_part2, width2, row2, column2, p_slot, columns, first, start, stop, ROWS, COLUMNS)
            first += width2
        if PARTS > 3:
            _publish_part(p_part3, width3, row3, column3, p_slot, columns, first, start, stop, ROWS, COLUMNS)
        finish(DRAIN)
        tell(p_table, 0, RANKS, ready + (me * PIECES + i_piece) * _LINE, epoch)


@triton.jit
def _pull(
    i_program, p_table, p_status, p_landing, rows, columns, slot, epoch, me, max_spins, ready, pulled, failed,
    RANKS: tl.constexpr, PIECES: tl.constexpr, PULLS: tl.constexpr, COPY: tl.constexpr, DRAIN: tl.constexpr,
):  # fmt: skip
    """Copies pieces i_program, + PULLS, .. of every rank's slice to where they lie in the bucket."""
    for i_piece in range(i_program, PIECES, PULLS):
        start = i_piece * rows // PIECES
        count_ = ((i_piece + 1) * rows // PIECES - start) * columns
        for i in range(RANKS):
            # Ranks and programs start at different peers: every link is in use at once.
            peer = (me + 1 + i + i_program) % RANKS
            there = wait(
                p_table, p_status, me, peer, peer + 1, epoch, max_spins, ready + i_piece * _LINE,
                PIECES * _LINE, failed, _READY,
            )  # fmt: skip
            p_from = at(p_table, peer, slot).to(tl.pointer_type(p_landing.dtype.element_ty))
            p_from += start.to(tl.int64) * columns
            p_to = p_landing + (peer * rows + start).to(tl.int64) * columns
            for i_copy in range(0, count_, COPY):
                o = i_copy + tl.arange(0, COPY)
                b = tl.load(p_from + o, o < count_ * there, other=float("nan"))
                tl.store(p_to + o, b, o < count_)
            if there > 0:
                finish(DRAIN)
                tell(p_table, peer, peer + 1, pulled + (me * PIECES + i_piece) * _LINE, epoch)


@triton.jit
def _tile(
    p_a, p_b, rows, columns, depth, a_row, a_depth, b_depth, b_column, i_row, i_column,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A tile of a [rows, depth] times b [depth, columns], fp32; strides in elements."""
    tl.assume(a_row > 0)
    tl.assume(a_row < 2097152)
    tl.assume(a_depth > 0)
    tl.assume(a_depth < 2097152)
    tl.assume(b_depth > 0)
    tl.assume(b_depth < 2097152)
    tl.assume(b_column > 0)
    tl.assume(b_column < 2097152)
    o_m, o_n, o_k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    p_a += i_row.to(tl.int64) * BM * a_row
    p_b += i_column.to(tl.int64) * BN * b_column
    m_m, m_n = i_row * BM + o_m < rows, i_column * BN + o_n < columns
    o_a, o_b = o_m[:, None] * a_row + o_k[None, :] * a_depth, o_k[:, None] * b_depth + o_n[None, :] * b_column
    step = tl.full((), BK, tl.int64)
    b_sum = tl.zeros((BM, BN), tl.float32)
    for i_k in range(0, depth, BK):
        m_k = i_k + o_k < depth
        b_a = tl.load(p_a + o_a, m_m[:, None] & m_k[None, :], other=0.0)
        b_b = tl.load(p_b + o_b, m_k[:, None] & m_n[None, :], other=0.0)
        b_sum = tl.dot(b_a, b_b, b_sum, input_precision="ieee")
        p_a += step * a_depth
        p_b += step * b_depth
    return b_sum


@triton.jit
def _neighbours(i, num, XCDS: tl.constexpr):
    """The i-th of `num` programs' work, such that those of one XCD do what lies side by side."""
    if XCDS > 1:
        each, more = num // XCDS, num % XCDS
        i_xcd = i % XCDS
        i = i_xcd * each + tl.minimum(i_xcd, more) + i // XCDS
    return i


@triton.jit(do_not_specialize=_FIXED)
def matmul_pull_kernel(
    p_table, p_status, p_landing, p_a, p_b, p_out,
    slice_rows, slice_columns, slot, epoch, me, max_spins, ready, pulled, failed,
    rows, columns, depth, a_row, a_depth, b_depth, b_column,
    PULL: tl.constexpr, RANKS: tl.constexpr, PIECES: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PULLS: tl.constexpr, COPY: tl.constexpr,
    GROUP: tl.constexpr, XCDS: tl.constexpr, DRAIN: tl.constexpr,
):  # fmt: skip
    """out [rows, columns] = a b, a tile a program, after PULLS programs that pull, if PULL."""
    i_program = tl.program_id(0)
    i_tile = i_program - PULLS * PULL
    if i_tile < 0:
        _pull(
            i_program, p_table, p_status, p_landing, slice_rows, slice_columns, slot, epoch, me, max_spins,
            ready, pulled, failed, RANKS, PIECES, PULLS, COPY, DRAIN,
        )  # fmt: skip
    else:
        row_tiles, column_tiles = tl.cdiv(rows, BM), tl.cdiv(columns, BN)
        i_tile = _neighbours(i_tile, row_tiles * column_tiles, XCDS)
        i_group = i_tile // (GROUP * column_tiles)
        height = tl.minimum(row_tiles - i_group * GROUP, GROUP)
        i_row = i_group * GROUP + i_tile % (GROUP * column_tiles) % height
        i_column = i_tile % (GROUP * column_tiles) // height
        b = _tile(
            p_a, p_b, rows, columns, depth, a_row, a_depth, b_depth, b_column, i_row, i_column, BM, BN, BK
        )
        o_row, o_column = i_row * BM + tl.arange(0, BM), i_column * BN + tl.arange(0, BN)
        p = p_out + i_row.to(tl.int64) * BM * columns + i_column * BN
        p += tl.arange(0, BM)[:, None] * columns + tl.arange(0, BN)[None, :]
        m = (o_row < rows)[:, None] & (o_column < columns)[None, :]
        tl.store(p, b.to(p_out.dtype.element_ty), m)


@triton.jit(do_not_specialize=_FIXED)
def matmul_scatter_kernel(
    p_table, p_status, p_a, p_b,
    staging, source_bytes, target, me, max_spins, arrived, freed, failed,
    rows, first, wide, columns, depth, a_row, a_depth, b_depth, b_column,
    RANKS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, XCDS: tl.constexpr,
    DRAIN: tl.constexpr,
):  # fmt: skip
    """Rows r of a b, r's slice of [rows] each, into this rank's place with rank r, [rows, wide] in fp32.

    From column `first` on. Neighbouring programs write to different owners, so every link is in use at once.
    """
    row_tiles, column_tiles = tl.cdiv(rows, BM), tl.cdiv(columns, BN)
    i_tile = _neighbours(tl.program_id(0), RANKS * row_tiles * column_tiles, XCDS)
    owner = (me + i_tile) % RANKS
    i_row, i_column = i_tile // RANKS % row_tiles, i_tile // RANKS // row_tiles
    p_a += owner.to(tl.int64) * rows * a_row
    b = _tile(p_a, p_b, rows, columns, depth, a_row, a_depth, b_depth, b_column, i_row, i_column, BM, BN, BK)
    # What was there two buckets ago must have been summed.
    free = wait(p_table, p_status, me, owner, owner + 1, target, max_spins, freed, _LINE, failed, _FREED)
    if free > 0:
        p = at(p_table, owner, staging + me.to(tl.int64) * source_bytes).to(tl.pointer_type(tl.float32))
        p += i_row.to(tl.int64) * BM * wide + first + i_column * BN
        o_row, o_column = tl.arange(0, BM), tl.arange(0, BN)
        m = (i_row * BM + o_row < rows)[:, None] & (i_column * BN + o_column < columns)[None, :]
        tl.store(p + (o_row[:, None] * wide + o_column[None, :]), b, m)
        finish(DRAIN)
        count(p_table, owner, owner + 1, arrived + me * _LINE)


@triton.jit
def _reduce_part(
    p_part, width, stride_row, stride_column, staging, source_bytes, columns, first, rows, there, i_program,
    RANKS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Sums every rank's columns from `first` on, rank 0 first, into a part."""
    column_tiles = tl.cdiv(width, COLUMNS)
    for i_tile in range(i_program, tl.cdiv(rows, ROWS) * column_tiles, PROGRAMS):
        o_row = i_tile // column_tiles * ROWS + tl.arange(0, ROWS)[:, None]
        o_column = i_tile % column_tiles * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        m = (o_row < rows) & (o_column < width)
        o = o_row.to(tl.int64) * columns + (first + o_column)
        b_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
        for i_rank in tl.static_range(RANKS):
            p = (staging + i_rank * source_bytes.to(tl.int64)).to(tl.pointer_type(tl.float32))
            b_sum += tl.load(p + o, m & (o_row < rows * there), other=float("nan"))
        p = p_part + o_row.to(tl.int64) * stride_row + o_column.to(tl.int64) * stride_column
        tl.store(p, b_sum, m)


@triton.jit(do_not_specialize=_FIXED)
def reduce_kernel(
    p_table, p_status,
    p_part0, p_part1, p_part2, p_part3,
    width0, width1, width2, width3,
    row0, row1, row2, row3,
    column0, column1, column2, column3,
    rows, columns, staging, source_bytes, target, me, max_spins, arrived, freed, failed,
    PARTS: tl.constexpr, RANKS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PROGRAMS: tl.constexpr, DRAIN: tl.constexpr,
):  # fmt: skip
    """The ranks' gradients [rows, columns] of this rank's slice, summed into its shards' columns."""
    i = tl.program_id(0)
    there = wait(p_table, p_status, me, 0, RANKS, target, max_spins, arrived, _LINE, failed, _ARRIVED)
    own = at(p_table, me, staging)
    _reduce_part(
        p_part0, width0, row0, column0, own, source_bytes, columns, 0, rows, there, i,
        RANKS, ROWS, COLUMNS, PROGRAMS,
    )  # fmt: skip
    first = width0
    if PARTS > 1:
        _reduce_part(
            p_part1, width1, row1, column1, own, source_bytes, columns, first, rows, there, i,
            RANKS, ROWS, COLUMNS, PROGRAMS,
        )  # fmt: skip
        first += width1
    if PARTS > 2:
        _reduce_part(
            p_part2, width2, row2, column2, own, source_bytes, columns, first, rows, there, i,
            RANKS, ROWS, COLUMNS, PROGRAMS,
        )  # fmt: skip
        first += width2
    if PARTS > 3:
        _reduce_part(
            p_part3, width3, row3, column3, own, source_bytes, columns, first, rows, there, i,
            RANKS, ROWS, COLUMNS, PROGRAMS,
        )  # fmt: skip
    if there > 0:
        finish(DRAIN)
        count(p_table, 0, RANKS, freed + me * _LINE)


_PARTS = {f"p_part{i}": "*fp32" for i in range(4)}
_SIZES = {f"{name}{i}": "i32" for name in ("width", "row", "column") for i in range(4)}
_PEERS = dict(p_table="*i64", p_status="*i32")
_SUFFIX = {"*bf16": "", "*fp32": " in fp32"}


def variants(target: str) -> Iterator[Variant]:
    """Every kernel of this file with every config of a chip, as op.py launches it on 8 ranks.

    In bf16; products in fp32, too.
    """
    # Gate, up and down: two weights lie the other way round (rows one apart), one does not.
    layout = dict(row0=1, row1=1, row2="i32", row3=1, column0="i32", column1="i32", column2=1, column3="i32")
    sizes = {k: v for k, v in (_SIZES | layout).items() if v == "i32"}
    ones = {k: v for k, v in layout.items() if v == 1}
    parts = _PEERS | _PARTS | sizes | dict(rows="i32", columns="i32")
    for config in PUBLISH[target]:
        signature = parts | dict(
            slot="i32", epoch="i32", me="i32", max_spins="i32", ready="i32", pulled="i32", failed="i32"
        )
        constants = dict(DTYPE=tl.bfloat16, PARTS=3, PIECES=64, RANKS=8, **ones)
        aligned = ("columns", "slot", "ready", "pulled", "failed", *sizes)
        yield Variant(publish_kernel, "streamed/publish", signature, constants, config, aligned, waits=True)
    # sm_90 has no matrix instructions for whole fp32.
    for dtype, matrix, matmul, scatter in (
        ("*bf16", True, MATMUL, SCATTER),
        ("*fp32", target != "sm_90", MATMUL_FP32, SCATTER_FP32),
    ):
        for config in matmul[target]:
            yield from _matmul_variants(config, dtype, matrix)
        for config in scatter[target]:
            yield _scatter_variant(config, dtype, matrix)
    for config in REDUCE[target]:
        signature = parts | dict(
            staging="i32", source_bytes="i32", target="i32", me="i32", max_spins="i32", arrived="i32",
            freed="i32", failed="i32",
        )  # fmt: skip
        aligned = ("columns", "staging", "source_bytes", "arrived", "freed", "failed", *sizes)
        constants = dict(PARTS=3, RANKS=8, **ones)
        yield Variant(reduce_kernel, "streamed/reduce", signature, constants, config, aligned, waits=True)


def _matmul_variants(config: Config, dtype: str, matrix: bool) -> Iterator[Variant]:
    """Without and with a pull beside the product."""
    signature = _PEERS | dict(
        p_landing=dtype, p_a=dtype, p_b=dtype, p_out=dtype,
        slice_rows="i32", slice_columns="i32", slot="i32", epoch="i32", me="i32", max_spins="i32",
        ready="i32", pulled="i32", failed="i32",
        rows="i32", columns="i32", depth="i32", a_row="i32", b_depth="i32",
    )  # fmt: skip
    aligned = (
        "slice_rows", "slice_columns", "slot", "ready", "pulled", "failed",
        "rows", "columns", "depth", "a_row", "b_depth",
    )  # fmt: skip
    for pull in (False, True):
        label = ("streamed/matmul_pull" if pull else "streamed/matmul") + _SUFFIX[dtype]
        constants = dict(PULL=pull, PIECES=64, a_depth=1, b_column=1, RANKS=8)
        yield Variant(matmul_pull_kernel, label, signature, constants, config, aligned, matrix, waits=pull)


def _scatter_variant(config: Config, dtype: str, matrix: bool) -> Variant:
    signature = _PEERS | dict(
        p_a=dtype, p_b=dtype, staging="i32", source_bytes="i32", target="i32", me="i32",
        max_spins="i32", arrived="i32", freed="i32", failed="i32",
        rows="i32", first="i32", wide="i32", columns="i32", depth="i32", a_depth="i32", b_depth="i32",
    )  # fmt: skip
    aligned = (
        "staging", "source_bytes", "arrived", "freed", "failed",
        "rows", "wide", "columns", "depth", "a_depth", "b_depth",
    )  # fmt: skip
    label, constants = "streamed/matmul_scatter" + _SUFFIX[dtype], dict(a_row=1, b_column=1, RANKS=8)
    return Variant(matmul_scatter_kernel, label, signature, constants, config, aligned, matrix, waits=True)
