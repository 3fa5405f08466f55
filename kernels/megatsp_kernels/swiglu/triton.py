"""SwiGLU, a tile of rows and columns a program."""

from collections.abc import Iterator

import triton
import triton.language as tl

from megatsp_kernels.aot import Variant
from megatsp_kernels.common import Config

# Bound by memory: 8 elements a lane and load (16 bytes of bf16), enough rows to fill the wavefronts.
TABLE = {
    "gfx942": [
        Config(dict(ROWS=4, COLUMNS=512), num_warps=4),
        Config(dict(ROWS=8, COLUMNS=512), num_warps=8),
    ],
    "gfx950": [Config(dict(ROWS=4, COLUMNS=512), num_warps=4)],
    "sm_90": [
        Config(dict(ROWS=4, COLUMNS=512), num_warps=4),
        Config(dict(ROWS=2, COLUMNS=1024), num_warps=4),
    ],
    "interpreter": [Config(dict(ROWS=4, COLUMNS=16))],
}


@triton.jit
def forward_kernel(p_gate_up, p_out, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    o_column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    m = (o_row < rows) & (o_column < columns)
    p_gate = p_gate_up + o_row * 2 * columns + o_column
    b_gate = tl.load(p_gate, m, other=0.0).to(tl.float32)
    b_up = tl.load(p_gate + columns, m, other=0.0).to(tl.float32)
    b_out = b_gate * tl.sigmoid(b_gate) * b_up
    tl.store(p_out + o_row * columns + o_column, b_out.to(p_out.dtype.element_ty), m)


@triton.jit
def backward_kernel(
    p_dout, p_gate_up, p_dgate_up, p_out, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Also writes the forward's result again: the gradient of the down projection needs it.

    p_dgate_up may be p_gate_up, and p_out p_dout: a program reads what it writes, and nothing else.
    """
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    o_column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    m = (o_row < rows) & (o_column < columns)
    o_gate, o_out = o_row * 2 * columns + o_column, o_row * columns + o_column
    b_gate = tl.load(p_gate_up + o_gate, m, other=0.0).to(tl.float32)
    b_up = tl.load(p_gate_up + o_gate + columns, m, other=0.0).to(tl.float32)
    b_dout = tl.load(p_dout + o_out, m, other=0.0).to(tl.float32)
    b_sigmoid = tl.sigmoid(b_gate)
    b_silu = b_gate * b_sigmoid
    b_dgate = b_dout * b_up * (b_sigmoid + b_silu * (1.0 - b_sigmoid))
    tl.store(p_dgate_up + o_gate, b_dgate.to(p_dgate_up.dtype.element_ty), m)
    tl.store(p_dgate_up + o_gate + columns, (b_dout * b_silu).to(p_dgate_up.dtype.element_ty), m)
    tl.store(p_out + o_out, (b_silu * b_up).to(p_out.dtype.element_ty), m)


def variants(target: str) -> Iterator[Variant]:
    """Every kernel of this file with every config of a chip, as op.py launches it in bf16."""
    sizes = dict(rows="i32", columns="i32")
    for config in TABLE[target]:
        pointers = dict(p_gate_up="*bf16", p_out="*bf16")
        yield Variant(forward_kernel, "swiglu/forward", pointers | sizes, {}, config, ("columns",))
        pointers = dict(p_dout="*bf16", p_gate_up="*bf16", p_dgate_up="*bf16", p_out="*bf16")
        yield Variant(backward_kernel, "swiglu/backward", pointers | sizes, {}, config, ("columns",))
