"""The custom ops of op.py, which checks and documents what they take."""

from typing import Any

import torch
from torch import Tensor

from megatsp_kernels.common import Table, choose, launch


def by_tokens(q: Tensor, dtype: torch.dtype) -> Tensor:
    """Empty, of q's shape [B, H, Tq, d], in memory [B, Tq, H, d]."""
    batch, heads, length, width = q.shape
    return q.new_empty(batch, length, heads, width, dtype=dtype).transpose(1, 2)


def empty_results(q: Tensor) -> tuple[Tensor, Tensor]:
    return by_tokens(q, q.dtype), q.new_empty(q.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("megatsp::attention_step", mutates_args=("total", "maximum", "sum", "out", "lse"))
def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_starts: Tensor,
    k_starts: Tensor,
    q_first: Tensor | None,
    scale: float,
    first: bool,
    total: Tensor | None,
    maximum: Tensor | None,
    sum: Tensor | None,
    out: Tensor | None,
    lse: Tensor | None,
) -> None:
    """out and lse given: the last step."""
    from megatsp_kernels.attention.triton import TABLES, forward_kernel
    from megatsp_kernels.attention.triton_blocks import sizes, table

    tiles = table(TABLES, q.shape[-1], q.itemsize)
    launch(
        forward_kernel, _grid(q, q_starts, tiles), tiles, q, k, v, q_starts, k_starts, q_first, out, lse,
        total, maximum, sum, *q.stride()[:-1], *k.stride()[:-1], *v.stride()[:-1], _first_stride(q_first),
        *_sizes(q, k, q_starts, k_starts), scale,
        **sizes(q.shape[-1]), DOCUMENTS=q_first is not None, FIRST=first, LAST=out is not None,
    )  # fmt: skip


@torch.library.custom_op("megatsp::attention", mutates_args=())
def whole(
    q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor, q_first: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    out, lse = empty_results(q)
    step(q, k, v, q_starts, k_starts, q_first, scale, True, None, None, None, out, lse)
    return out, lse


@torch.library.custom_op("megatsp::attention_delta", mutates_args=())
def delta(out: Tensor, dout: Tensor) -> Tensor:
    from megatsp_kernels.attention.triton_backward import DELTA_TABLE, delta_kernel
    from megatsp_kernels.attention.triton_blocks import sizes

    result = out.new_empty(out.shape[:-1], dtype=torch.float32)
    batch, heads, length, width = out.shape
    blocks = -(-length // choose(DELTA_TABLE, out.device)[0].blocks["QUERIES"])
    strides = *out.stride()[:-1], *dout.stride()[:-1]
    launch(
        delta_kernel, (batch * heads * blocks,), DELTA_TABLE, out, dout, result, *strides, heads, length,
        **sizes(width),
    )  # fmt: skip
    return result


@torch.library.custom_op("megatsp::attention_backward_step", mutates_args=("dq", "dk", "dv"))
def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    q_starts: Tensor,
    k_starts: Tensor,
    q_first: Tensor | None,
    scale: float,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    add_q: bool,
    add_kv: bool,
) -> None:
    """add_q, add_kv: to what dq, or dk and dv, hold; else they are overwritten."""
    from megatsp_kernels.attention.triton_backward import (
        KEYS_TABLES,
        QUERIES_TABLES,
        keys_kernel,
        queries_kernel,
    )
    from megatsp_kernels.attention.triton_blocks import sizes, table

    width = q.shape[-1]
    inputs = dout, q, k, v, lse, delta, q_starts, k_starts, q_first
    strides = *dout.stride()[:-1], *q.stride()[:-1], *k.stride()[:-1], *v.stride()[:-1]
    counts = _first_stride(q_first), *_sizes(q, k, q_starts, k_starts), scale
    constants = dict(sizes(width), DOCUMENTS=q_first is not None)
    tiles = table(QUERIES_TABLES, width, q.itemsize)
    launch(
        queries_kernel, _grid(q, q_starts, tiles), tiles, *inputs, dq, *strides, *dq.stride()[:-1], *counts,
        **constants, ADD=add_q,
    )  # fmt: skip
    tiles = table(KEYS_TABLES, width, q.itemsize)
    launch(
        keys_kernel, _keys_grid(k, k_starts, tiles), tiles, *inputs, dk, dv, *strides, *dk.stride()[:-1],
        *dv.stride()[:-1], *counts, **constants, ADD=add_kv,
    )  # fmt: skip


def _first_stride(q_first: Tensor | None) -> int:
    return 0 if q_first is None else q_first.stride(0)


def _sizes(q: Tensor, k: Tensor, q_starts: Tensor, k_starts: Tensor) -> tuple[int, ...]:
    """B, H, K, n, tokens of a chunk of queries, S, m, tokens of a chunk of keys."""
    batch, heads, queries, _ = q.shape
    shards, _, kv_heads, keys, _ = k.shape
    q_chunks, k_chunks = q_starts.numel(), k_starts.numel() // max(1, shards)
    return batch, heads, kv_heads, q_chunks, queries // q_chunks, shards, k_chunks, keys // max(1, k_chunks)


def _grid(q: Tensor, q_starts: Tensor, tiles: Table) -> tuple[int]:
    """A program for each block of queries."""
    batch, heads, queries, _ = q.shape
    blocks = -(-queries // q_starts.numel() // choose(tiles, q.device)[0].blocks["QUERIES"])
    return (batch * heads * q_starts.numel() * blocks,)


def _keys_grid(k: Tensor, k_starts: Tensor, tiles: Table) -> tuple[int]:
    """A program for each block of keys."""
    shards, batch, kv_heads, keys, _ = k.shape
    chunks = k_starts.numel() // max(1, shards)
    blocks = -(-keys // max(1, chunks) // choose(tiles, k.device)[0].blocks["KEYS"])
    return (batch * kv_heads * shards * chunks * blocks,)


@step.register_fake
def _(*arguments: Any) -> None:
    return None


@backward.register_fake
def _(*arguments: Any) -> None:
    return None


@whole.register_fake
def _(q: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return empty_results(q)


@delta.register_fake
def _(out: Tensor, dout: Tensor) -> Tensor:
    return out.new_empty(out.shape[:-1], dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _gradient(ctx: Any, dout: Tensor, dlse: Any) -> tuple[Tensor | None, ...]:
    del dlse  # `attention` returns out alone
    q, k, v, q_starts, k_starts, q_first, out, lse = ctx.saved_tensors
    if dout.stride(-1) != 1:  # that of a sum has stride 0
        dout = dout.contiguous()
    dq = by_tokens(q, torch.float32)
    dk, dv = (k.new_empty(k.shape, dtype=torch.float32) for _ in range(2))
    backward(
        dout, q, k, v, lse, delta(out, dout), q_starts, k_starts, q_first, ctx.scale, dq, dk, dv, False, False
    )
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype), None, None, None, None


whole.register_autograd(_gradient, setup_context=_save)
