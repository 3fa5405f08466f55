"""RMSNorm, a tile of whole rows a program: a row is read once and stays in registers."""

from collections.abc import Iterator

import triton
import triton.language as tl

from megatsp_kernels.aot import Variant
from megatsp_kernels.common import Config, Table
from megatsp_kernels.rms_norm.op import LIMIT

# By the widest row a table is for. TILE: elements a program, one row of them or several. Bound by
# memory: 16 elements a lane, that is two loads of 16 bytes in bf16, from as few warps as hold the
# row, since the sum over a row waits for all of them. The others change rows or lanes by two.
FORWARD: dict[int, Table] = {
    4096: {
        "gfx942": [Config(dict(TILE=4096), num_warps=4), Config(dict(TILE=8192), num_warps=8)],
        "gfx950": [Config(dict(TILE=4096), num_warps=4)],
        "sm_90": [Config(dict(TILE=4096), num_warps=8), Config(dict(TILE=4096), num_warps=4)],
        "interpreter": [Config(dict(TILE=64))],
    },
    LIMIT: {
        "gfx942": [Config(dict(TILE=8192), num_warps=8), Config(dict(TILE=8192), num_warps=16)],
        "gfx950": [Config(dict(TILE=8192), num_warps=8)],
        "sm_90": [Config(dict(TILE=8192), num_warps=16), Config(dict(TILE=8192), num_warps=8)],
        "interpreter": [Config(dict(TILE=64))],
    },
}
# PROGRAMS: how many there are at most, each with a partial sum of dgain: what the chip holds at once by
# registers (304 compute units on gfx942, 256 on gfx950, 132 on sm_90), which hides the loads and keeps
# the partial sums to a few per cent of the traffic. STAGES: sm_90 holds too few of these programs, so
# there the next rows are copied to shared memory meanwhile; 3 stages are two buffers.
BACKWARD: dict[int, Table] = {
    4096: {
        "gfx942": [
            Config(dict(TILE=4096, PROGRAMS=1216, STAGES=1), num_warps=4),
            Config(dict(TILE=4096, PROGRAMS=608, STAGES=1), num_warps=4),
        ],
        "gfx950": [Config(dict(TILE=4096, PROGRAMS=1024, STAGES=1), num_warps=4)],
        "sm_90": [Config(dict(TILE=4096, PROGRAMS=264, STAGES=3), num_warps=8)],
        "interpreter": [Config(dict(TILE=64, PROGRAMS=2, STAGES=1))],
    },
    8192: {
        "gfx942": [Config(dict(TILE=8192, PROGRAMS=608, STAGES=1), num_warps=8)],
        "gfx950": [Config(dict(TILE=8192, PROGRAMS=512, STAGES=1), num_warps=8)],
        "sm_90": [Config(dict(TILE=8192, PROGRAMS=132, STAGES=3), num_warps=16)],
        "interpreter": [Config(dict(TILE=64, PROGRAMS=2, STAGES=1))],
    },
}
# Wider rows go by parts, read again from the cache once the row's sums are known: whole rows spill on
# sm_90. 8 elements a lane; as many programs as registers allow.
WIDE: dict[int, Table] = {
    LIMIT: {
        "gfx942": [Config(dict(PART=4096, PROGRAMS=608, STAGES=1), num_warps=8)],
        "gfx950": [Config(dict(PART=4096, PROGRAMS=512, STAGES=1), num_warps=8)],
        "sm_90": [Config(dict(PART=4096, PROGRAMS=132, STAGES=3), num_warps=16)],
        "interpreter": [Config(dict(PART=2048, PROGRAMS=2, STAGES=1))],
    },
}


@triton.jit
def _offset(o_row, inner, outer_stride, inner_stride):
    """Where row [i_outer, i_inner] of a tensor begins."""
    return (o_row // inner).to(tl.int64) * outer_stride + (o_row % inner).to(tl.int64) * inner_stride


@triton.jit
def _normalise(b_x, b_gain, n, epsilon, dtype: tl.constexpr):
    """Rounds to `dtype` before the gain and after; a product of two such numbers is exact in fp32."""
    b_inverse = tl.rsqrt(tl.sum(b_x * b_x, 1) / n + epsilon)
    b_normed = (b_x * b_inverse[:, None]).to(dtype).to(tl.float32)
    return (b_normed * b_gain.to(dtype).to(tl.float32)).to(dtype)


@triton.jit
def forward_kernel(
    p_x, p_gain, p_y, epsilon, rows, n, inner, outer_stride, inner_stride,
    WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = TILE // WIDTH if TILE > WIDTH else 1
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    o_column = tl.arange(0, WIDTH)[None, :]
    m = (o_row < rows) & (o_column < n)
    b_x = tl.load(p_x + _offset(o_row, inner, outer_stride, inner_stride) + o_column, m, other=0.0)
    b_gain = tl.load(p_gain + o_column, o_column < n, other=0.0)
    b_y = _normalise(b_x.to(tl.float32), b_gain, n, epsilon, p_y.dtype.element_ty)
    tl.store(p_y + o_row.to(tl.int64) * n + o_column, b_y, m)


@triton.jit
def add_forward_kernel(
    p_x, p_update, p_gain, p_total, p_y, epsilon, rows, n,
    x_inner, x_outer_stride, x_inner_stride, update_inner, update_outer_stride, update_inner_stride,
    WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """p_total may be p_update: no element has two readers, a tile being at least 8 elements a lane."""
    ROWS: tl.constexpr = TILE // WIDTH if TILE > WIDTH else 1
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    o_column = tl.arange(0, WIDTH)[None, :]
    m = (o_row < rows) & (o_column < n)
    o_x = _offset(o_row, x_inner, x_outer_stride, x_inner_stride) + o_column
    o_update = _offset(o_row, update_inner, update_outer_stride, update_inner_stride) + o_column
    b_x = tl.load(p_x + o_x, m, other=0.0).to(tl.float32)
    b_update = tl.load(p_update + o_update, m, other=0.0).to(tl.float32)
    b_gain = tl.load(p_gain + o_column, o_column < n, other=0.0)
    b_total = (b_x + b_update).to(p_total.dtype.element_ty)
    o_y = o_row.to(tl.int64) * n + o_column
    tl.store(p_total + o_y, b_total, m)
    b_y = _normalise(b_total.to(tl.float32), b_gain, n, epsilon, p_y.dtype.element_ty)
    tl.store(p_y + o_y, b_y, m)


@triton.jit
def backward_kernel(
    p_dy, p_x, p_gain, p_dresidual, p_dx, p_dgain, epsilon, rows, n,
    dy_inner, dy_outer_stride, dy_inner_stride, x_inner, x_outer_stride, x_inner_stride,
    dresidual_inner, dresidual_outer_stride, dresidual_inner_stride,
    WIDTH: tl.constexpr, TILE: tl.constexpr, PROGRAMS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Every PROGRAMS-th tile; p_dgain: [programs, n], this program's sum over its rows.

    With r = 1 / rms(x): dx = r dy gain - x r^3 <dy gain, x> / n, and dgain = sum of r dy x.
    """
    ROWS: tl.constexpr = TILE // WIDTH if TILE > WIDTH else 1
    o_column = tl.arange(0, WIDTH)[None, :]
    m_column = o_column < n
    b_gain = tl.load(p_gain + o_column, m_column, other=0.0).to(tl.float32)
    b_dgain = tl.zeros([ROWS, WIDTH], tl.float32)
    for i_tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), PROGRAMS, num_stages=STAGES):
        o_row = i_tile * ROWS + tl.arange(0, ROWS)[:, None]
        m = (o_row < rows) & m_column
        o_dy = _offset(o_row, dy_inner, dy_outer_stride, dy_inner_stride) + o_column
        o_x = _offset(o_row, x_inner, x_outer_stride, x_inner_stride) + o_column
        b_dy = tl.load(p_dy + o_dy, m, other=0.0).to(tl.float32)
        b_x = tl.load(p_x + o_x, m, other=0.0).to(tl.float32)
        # Rows past the end are zero; with epsilon 0 their infinite inverse would make that NaN.
        b_square = tl.sum(b_x * b_x, 1)[:, None] / n + epsilon
        b_inverse = tl.rsqrt(tl.where(o_row < rows, b_square, 1.0))
        b_product = b_dy * b_x
        b_projection = tl.sum(b_product * b_gain, 1)[:, None] * (b_inverse * b_inverse * b_inverse / n)
        b_dgain += b_product * b_inverse
        b_dx = b_dy * b_gain * b_inverse - b_x * b_projection
        if p_dresidual is not None:
            o_dresidual = _offset(o_row, dresidual_inner, dresidual_outer_stride, dresidual_inner_stride)
            b_dx += tl.load(p_dresidual + o_dresidual + o_column, m, other=0.0).to(tl.float32)
        tl.store(p_dx + o_row.to(tl.int64) * n + o_column, b_dx.to(p_dx.dtype.element_ty), m)
    o_dgain = tl.program_id(0).to(tl.int64) * n + tl.arange(0, WIDTH)
    tl.store(p_dgain + o_dgain, tl.sum(b_dgain, 0), tl.arange(0, WIDTH) < n)


@triton.jit
def parts_backward_kernel(
    p_dy, p_x, p_gain, p_dresidual, p_dx, p_dgain, epsilon, rows, n,
    dy_inner, dy_outer_stride, dy_inner_stride, x_inner, x_outer_stride, x_inner_stride,
    dresidual_inner, dresidual_outer_stride, dresidual_inner_stride,
    WIDTH: tl.constexpr, PART: tl.constexpr, PROGRAMS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """As backward_kernel, PART columns of one row at a time; dgain alone stays in registers."""
    PARTS: tl.constexpr = WIDTH // PART
    o_part = tl.arange(0, PARTS)[:, None]
    o = tl.arange(0, PART)[None, :]
    b_dgain = tl.zeros([PARTS, PART], tl.float32)
    for i_row in range(tl.program_id(0), rows, PROGRAMS):
        o_row = i_row + tl.arange(0, 1)[:, None]
        p_dy_row = p_dy + _offset(o_row, dy_inner, dy_outer_stride, dy_inner_stride)
        p_x_row = p_x + _offset(o_row, x_inner, x_outer_stride, x_inner_stride)
        o_dresidual = _offset(o_row, dresidual_inner, dresidual_outer_stride, dresidual_inner_stride)
        b_square = tl.zeros([1, PART], tl.float32)
        b_projection = tl.zeros([1, PART], tl.float32)
        for start in tl.range(0, n, PART, num_stages=STAGES):
            o_column = start + o
            m = o_column < n
            b_x = tl.load(p_x_row + o_column, m, other=0.0).to(tl.float32)
            b_dy = tl.load(p_dy_row + o_column, m, other=0.0).to(tl.float32)
            b_gain = tl.load(p_gain + o_column, m, other=0.0).to(tl.float32)
            b_square += b_x * b_x
            b_projection += b_dy * b_x * b_gain
        inverse = tl.rsqrt(tl.sum(b_square) / n + epsilon)
        projection = tl.sum(b_projection) * (inverse * inverse * inverse / n)
        for start in range(0, n, PART):
            o_column = start + o
            m = o_column < n
            b_x = tl.load(p_x_row + o_column, m, other=0.0).to(tl.float32)
            b_dy = tl.load(p_dy_row + o_column, m, other=0.0).to(tl.float32)
            b_gain = tl.load(p_gain + o_column, m, other=0.0).to(tl.float32)
            b_dx = b_dy * b_gain * inverse - b_x * projection
            if p_dresidual is not None:
                b_dx += tl.load(p_dresidual + o_dresidual + o_column, m, other=0.0).to(tl.float32)
            tl.store(p_dx + o_row.to(tl.int64) * n + o_column, b_dx.to(p_dx.dtype.element_ty), m)
            b_dgain += tl.where(o_part == start // PART, b_dy * b_x * inverse, 0.0)
    o_column = o_part * PART + o
    tl.store(p_dgain + tl.program_id(0).to(tl.int64) * n + o_column, b_dgain, o_column < n)


def table(tables: dict[int, Table], width: int) -> Table:
    """That for rows padded to `width`."""
    return tables[min(widest for widest in tables if width <= widest)]


def variants(target: str) -> Iterator[Variant]:
    """Every kernel with every config of a chip, as op.py launches it in bf16; 128: views of heads."""
    for width in (128, 4096, 8192, LIMIT):
        for config in table(FORWARD, width)[target]:
            yield _variant(forward_kernel, "forward", width, config, ("",), p_x="*bf16", p_y="*bf16")
            pointers = dict(p_x="*bf16", p_update="*fp32", p_total="*bf16", p_y="*bf16")
            yield _variant(add_forward_kernel, "add", width, config, ("x_", "update_"), **pointers)
        backward = parts_backward_kernel if width == LIMIT else backward_kernel
        for config in table(BACKWARD | WIDE, width)[target]:
            pointers = dict(p_dy="*fp32", p_x="*bf16", p_dresidual="*bf16", p_dx="*fp32", p_dgain="*fp32")
            yield _variant(backward, "backward", width, config, ("dy_", "x_", "dresidual_"), **pointers)


def _variant(
    kernel: triton.JITFunction,
    label: str,
    width: int,
    config: Config,
    strided: tuple[str, ...],
    **pointers: str,
) -> Variant:
    """Contiguous rows (inner is 1), but for heads [B, T, H, 128]. strided: prefixes of strides."""
    types = pointers | dict(p_gain="*fp32", epsilon="fp32", rows="i32", n="i32")
    constants: dict[str, int] = dict(WIDTH=width)
    for prefix in strided:
        types |= {prefix + "outer_stride": "i32", prefix + "inner_stride": "i32"}
        if width == 128:
            types[prefix + "inner"] = "i32"
        else:
            constants[prefix + "inner"] = 1
    signature = {name: types[name] for name in kernel.arg_names if name in types}
    aligned = ("n", *(name for name in signature if name.endswith("stride")))
    return Variant(kernel, f"rms_norm/{label} {width}", signature, constants, config, aligned)
