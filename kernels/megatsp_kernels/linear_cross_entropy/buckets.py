"""One vocabulary bucket's forward and backward: which kernels run on which columns, in which memory."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from megatsp_kernels.common import choose, launch

MAX_STRIDE = 1 << 23  # elements; the kernels' offsets inside a tile of up to 256 rows are int32
_ALIGNED = 128  # columns: a cache line of bf16, and whole blocks of the gradients' products


def forward(x: Tensor, w: Tensor, targets: Tensor, start: int, lse: Tensor, target_logit: Tensor) -> None:
    """As `cross_entropy_step`, without its checks."""
    from megatsp_kernels.linear_cross_entropy import triton as kernels

    (rows, depth), columns = x.shape, w.shape[1]
    if not rows or not columns:
        return
    table = kernels.TABLE_FP32 if x.dtype == torch.float32 else kernels.TABLE
    config, target = choose(table, x.device)
    row_blocks, blocks = -(-rows // config.blocks["M"]), -(-columns // config.blocks["N"])
    at_once = kernels.AT_ONCE.get(target, kernels.AT_ONCE["gfx942" if target.startswith("gfx") else "sm_90"])
    splits, split_blocks = split(row_blocks, blocks, at_once)
    b_max, b_sum = x.new_empty(2, splits, rows, dtype=torch.float32)
    launch(
        kernels.forward_kernel, (row_blocks * splits,), table, x, w, targets, b_max, b_sum, target_logit,
        start, rows, columns, depth, *w.stride(), splits, split_blocks, EVEN=depth % config.blocks["K"] == 0,
    )  # fmt: skip
    table = kernels.COMBINE_TABLE
    programs = -(-rows // choose(table, x.device)[0].blocks["ROWS"])
    launch(kernels.combine_kernel, (programs,), table, b_max, b_sum, lse, rows, splits)


@cache
def split(row_blocks: int, blocks: int, at_once: int) -> tuple[int, int]:
    """Into how many splits `blocks` blocks of columns go, and how many each has (the last maybe fewer).

    The least time, in blocks, of row_blocks x splits programs, `at_once` of them at a time; then the
    fewest splits. None is empty.
    """

    def time(splits: int) -> int:
        return -(-row_blocks * splits // at_once) * -(-blocks // splits)

    splits = min(range(1, min(blocks, at_once) + 1), key=lambda s: (time(s), s))
    split_blocks = -(-blocks // splits)
    return -(-blocks // split_blocks), split_blocks


def backward(
    x: Tensor,
    w: Tensor,
    targets: Tensor,
    start: int,
    lse: Tensor,
    a: Tensor,
    b: Tensor,
    dx: Tensor | None,
    dw: Tensor | None,
    add: bool,
    workspace_bytes: int,
) -> None:
    """As `cross_entropy_backward_step`, without its checks; dx is written instead of added to without `add`.

    None instead of dx or dw: that gradient is not computed.
    """
    rows, columns = x.shape[0], w.shape[1]
    if dx is not None and not columns and not add:
        dx.zero_()
    width = chunk_columns(rows, columns, x.element_size(), workspace_bytes)
    workspace = x.new_empty(rows, width)
    for first in range(0, columns, max(1, width)):
        w_chunk = w[:, first : first + width]
        dlogits = workspace[:, : w_chunk.shape[1]]
        _dlogits(x, w_chunk, targets, start + first, lse, a, b, dlogits)
        if dx is not None:
            _product(dlogits, w_chunk.t(), dx, add or first > 0)
        if dw is not None:
            _product(x.t(), dlogits, dw[:, first : first + width], False)


def chunk_columns(rows: int, columns: int, itemsize: int, workspace_bytes: int) -> int:
    """Columns of dlogits [rows, .] that fit a workspace: in chunks as even as whole blocks allow.

    Raises:
        ValueError: not one column fits.
    """
    most = workspace_bytes // max(1, rows * itemsize)
    if columns <= most:
        return columns
    if not most:
        raise ValueError(
            f"cross_entropy_backward_step: workspace_bytes={workspace_bytes} holds no column of {rows} rows; "
            f"give at least {rows * itemsize}, better {_ALIGNED} times that"
        )
    even = -(-columns // -(-columns // most))
    if most < _ALIGNED:
        return even
    most -= most % _ALIGNED
    even = -(-columns // -(-columns // most))
    return even + -even % _ALIGNED


def _gradient_table(x: Tensor) -> Any:
    from megatsp_kernels.linear_cross_entropy import triton as kernels

    return kernels.TABLE_FP32 if x.dtype == torch.float32 else kernels.GRADIENT_TABLE


def _dlogits(
    x: Tensor, w: Tensor, targets: Tensor, start: int, lse: Tensor, a: Tensor, b: Tensor, out: Tensor
) -> None:
    from megatsp_kernels.linear_cross_entropy.triton import dlogits_kernel

    (rows, depth), columns, table = x.shape, w.shape[1], _gradient_table(x)
    blocks = choose(table, x.device)[0].blocks
    grid = (-(-rows // blocks["M"]) * -(-columns // blocks["N"]),)
    launch(
        dlogits_kernel, grid, table, x, w, targets, lse, a, b, out, start, rows, columns, depth, *w.stride(),
        out.stride(0), EVEN=depth % blocks["K"] == 0,
    )  # fmt: skip


def _product(a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
    """out = a b, or with `add` becomes so much more. Operands and out lie either way round."""
    from megatsp_kernels.linear_cross_entropy.triton import product_kernel

    if out.stride(1) != 1:
        a, b, out = b.t(), a.t(), out.t()
    (rows, depth), columns, table = a.shape, b.shape[1], _gradient_table(a)
    blocks = choose(table, a.device)[0].blocks
    grid = (-(-rows // blocks["M"]) * -(-columns // blocks["N"]),)
    launch(
        product_kernel, grid, table, a, b, out, rows, columns, depth, *a.stride(), *b.stride(), out.stride(0),
        EVEN=depth % blocks["K"] == 0, ADD=add,
    )  # fmt: skip
