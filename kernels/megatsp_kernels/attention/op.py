"""Attention over keys and values that arrive in steps, by Triton, forward and backward.

The queries of a rank are equal chunks of the sequence, wherever they lie in it; so are the keys of each
shard that has arrived. Where a chunk begins is all that tells what sees what: causal, zigzag, gathered or
ring, with packed documents or without, is one kernel. Softmax widens inside the kernel from step to step.

Source: Dao, FlashAttention-2, arXiv:2307.08691; Liu et al., Ring Attention, arXiv:2310.01889.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatsp_kernels.attention import custom_ops
from megatsp_kernels.common import check_factor, check_tensors, overlaps_itself

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_WIDTH = 256
MAX_STRIDE = 2**21  # elements between rows: a block's offsets then fit into 32 bits of bytes


@dataclass
class AttentionState:
    """Softmax over the keys seen so far, unnormalised, in fp32 and contiguous.

    out: [B, H, Tq, d], the sum of 2^(s - maximum) v over the keys seen. maximum: [B, H, Tq], of the scaled
    scores s in base 2 (q k^T scale log2 e); -inf where nothing was seen. sum: [B, H, Tq], of 2^(s - maximum).
    """

    out: Tensor
    maximum: Tensor
    sum: Tensor


def attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_starts: Tensor,
    k_starts: Tensor,
    scale: float,
    state: AttentionState | None = None,
    last: bool = True,
    q_first: Tensor | None = None,
) -> AttentionState | tuple[Tensor, Tensor]:
    """softmax(q k^T scale) v over the keys of this step and of those before it.

    A query sees the keys of its own position and before, from the first token of its document on. Blocks
    of keys that none of a block's queries sees are not read.

    Args:
        q: [B, H, Tq, d], fp32, fp16 or bf16, d a multiple of 8 up to 256. Its tokens are n equal chunks
            of the sequence.
        k, v: [S, B, K, t, d] in q's dtype: S shards as they arrived, K dividing H. The tokens of each are m
            equal chunks. q, k and v may have any strides but the last, which is 1.
        q_starts: [n], int64: the global position of each chunk's first token; positions are below 2^31.
            Fastest in ascending order, as are the k_starts of a shard.
        k_starts: [S*m], int64: likewise for the chunks of shard 0, then 1. Negative: the chunk is absent.
        scale: of the scores; positive.
        state: what the step before returned; None: there was none.
        last: normalise and return the results; else the state, updated in place.
        q_first: [B, Tq], int64: the position of the first token of each query's document, not decreasing
            within a chunk. None: 0.
    Returns:
        last: out [B, H, Tq, d] in q's dtype, in memory [B, Tq, H, d]; and the log-sum-exp [B, H, Tq] of the
        scores in fp32, natural logarithm. A query that saw nothing: 0 and -inf.
    Raises:
        ValueError: shapes, dtypes, strides or devices that do not fit, no GPU, or no triton.
    """
    _check("attention_step", q, k, v, q_starts, k_starts, scale, q_first)
    batch, heads, length, width = q.shape
    if state is not None:
        _check_state(state, q)
    elif not last:
        fp32 = q.new_empty(0, dtype=torch.float32)
        rows = (batch, heads, length)
        state = AttentionState(fp32.new_empty(*rows, width), fp32.new_empty(rows), fp32.new_empty(rows))
        custom_ops.step(q, k, v, q_starts, k_starts, q_first, scale, True, *_fields(state), None, None)
        return state
    first = state is None
    if not last:
        custom_ops.step(q, k, v, q_starts, k_starts, q_first, scale, first, *_fields(state), None, None)
        assert state is not None
        return state
    out, lse = custom_ops.empty_results(q)
    custom_ops.step(q, k, v, q_starts, k_starts, q_first, scale, first, *_fields(state), out, lse)
    return out, lse


def attention_delta(out: Tensor, dout: Tensor) -> Tensor:
    """The sum of out * dout over the last dim, in fp32: what `attention_backward_step` needs of every row.

    Args:
        out, dout: [B, H, Tq, d] of any one dtype and any strides but the last, which is 1.
    Returns:
        [B, H, Tq], fp32.
    Raises: as `attention_step`.
    """
    check_tensors("attention_delta", DTYPES, out=out)
    check_tensors("attention_delta", [out.dtype], out=out, dout=dout)
    if out.dim() != 4 or out.shape != dout.shape:
        raise ValueError(
            f"attention_delta takes out and dout [B, H, Tq, d]; got {tuple(out.shape)}, {tuple(dout.shape)}"
        )
    _check_layout("attention_delta", out=out, dout=dout)
    return custom_ops.delta(out, dout)


def attention_backward_step(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    q_starts: Tensor,
    k_starts: Tensor,
    scale: float,
    dq: Tensor | None = None,
    q_first: Tensor | None = None,
    dk: Tensor | None = None,
    dv: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the keys of one step contribute to the gradients, all fp32. The same bits every time.

    Args:
        dout: [B, H, Tq, d] in q's dtype, the gradient of the last step's out.
        lse: [B, H, Tq], fp32, contiguous: of the last step, over ALL keys. Where -inf, gradients are 0.
        delta: likewise, `attention_delta` of out and dout.
        dq: [B, H, Tq, d], fp32: added to in place. None: a new one, in memory [B, Tq, H, d].
        dk, dv: [S, B, K, t, d], fp32, both or neither: added to in place. None: new ones, 0 where no
            query sees the key. All three may have any strides but the last, which is 1.
        The others: as `attention_step`.
    Returns:
        dq, dk, dv.
    Raises: as `attention_step`.
    """
    name = "attention_backward_step"
    _check(name, q, k, v, q_starts, k_starts, scale, q_first)
    check_tensors(name, [q.dtype], q=q, dout=dout)
    check_tensors(name, [torch.float32], lse=lse, delta=delta)
    if dout.shape != q.shape or lse.shape != q.shape[:-1] or delta.shape != lse.shape:
        raise ValueError(
            f"{name}: dout must be like q {tuple(q.shape)}, lse and delta like its rows; "
            f"got {tuple(dout.shape)}, {tuple(lse.shape)}, {tuple(delta.shape)}"
        )
    if not (lse.is_contiguous() and delta.is_contiguous()) or lse.device != q.device:
        raise ValueError(f"{name}: lse and delta must be contiguous and on {q.device}: call .contiguous()")
    if (dk is None) != (dv is None):
        raise ValueError(f"{name} adds to dk and dv both, or makes both: give both or neither")
    given = {n: (t, like) for n, t, like in (("dq", dq, q), ("dk", dk, k), ("dv", dv, v)) if t is not None}
    for label, (gradient, like) in given.items():
        check_tensors(name, [torch.float32], **{label: gradient})
        if gradient.shape != like.shape or gradient.device != like.device:
            raise ValueError(
                f"{name}: {label} must be {tuple(like.shape)} on {like.device}; "
                f"got {tuple(gradient.shape)} on {gradient.device}"
            )
        if overlaps_itself(gradient):
            raise ValueError(f"{name}: {label} is expanded: its strides are {gradient.stride()}")
    _check_layout(name, dout=dout, **{label: gradient for label, (gradient, _) in given.items()})
    add_q, add_kv = dq is not None, dk is not None
    if dq is None:
        dq = custom_ops.by_tokens(q, torch.float32)
    if dk is None or dv is None:
        dk, dv = (k.new_empty(k.shape, dtype=torch.float32) for _ in range(2))
    custom_ops.backward(
        dout, q, k, v, lse, delta, q_starts, k_starts, q_first, scale, dq, dk, dv, add_q, add_kv
    )
    return dq, dk, dv


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    q_starts: Tensor | None = None,
    k_starts: Tensor | None = None,
    q_first: Tensor | None = None,
) -> Tensor:
    """`attention_step` with all keys at once; differentiable in q, k and v.

    Args:
        q: [B, H, Tq, d]. k, v: [S, B, K, t, d], or [B, K, t, d] for one shard.
        q_starts, k_starts: None: one chunk a shard, from position 0 on.
        The others: as `attention_step`.
    Returns:
        out [B, H, Tq, d] in q's dtype, in memory [B, Tq, H, d].
    Raises: as `attention_step`.
    """
    if k.dim() == 4 and v.dim() == 4:
        k, v = k[None], v[None]
    if q_starts is None:
        q_starts = torch.zeros(1, dtype=torch.int64, device=q.device)
    if k_starts is None:
        k_starts = torch.zeros(k.shape[0], dtype=torch.int64, device=q.device)
    _check("attention", q, k, v, q_starts, k_starts, scale, q_first)
    out, _ = custom_ops.whole(q, k, v, q_starts, k_starts, q_first, scale)
    return out


def _check(
    op: str, q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor, scale: float, q_first: Any
) -> None:
    check_tensors(op, DTYPES, q=q)
    check_tensors(op, [q.dtype], q=q, k=k, v=v)
    check_factor(op, q)
    integers = dict(q_starts=q_starts, k_starts=k_starts)
    if q_first is not None:
        integers["q_first"] = q_first
    check_tensors(op, [torch.int64], **integers)
    if q_starts.device != q.device:
        raise ValueError(f"{op}: q_starts is on {q_starts.device}, q on {q.device}")
    if (
        q.dim() != 4
        or k.dim() != 5
        or k.shape != v.shape
        or (k.shape[1], k.shape[-1]) != (q.shape[0], q.shape[-1])
        or not k.shape[2]
        or q.shape[1] % k.shape[2]
    ):
        raise ValueError(
            f"{op} takes q [B, H, Tq, d] and k, v [S, B, K, t, d] with K dividing H; "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    width, (shards, tokens) = q.shape[-1], (k.shape[0], k.shape[3])
    if width % 8 or not 0 < width <= MAX_WIDTH:
        raise ValueError(
            f"{op}: heads are {width} wide; it takes multiples of 8 up to {MAX_WIDTH}: pad them with zeros"
        )
    if q_starts.dim() != 1 or not q_starts.numel() or q.shape[2] % q_starts.numel():
        raise ValueError(
            f"{op}: q_starts must be [n], n dividing the {q.shape[2]} queries; got {tuple(q_starts.shape)}"
        )
    chunks = k_starts.numel() // max(1, shards)
    if k_starts.dim() != 1 or chunks * shards != k_starts.numel() or (shards and not chunks) or (
        chunks and tokens % chunks
    ):  # fmt: skip
        raise ValueError(
            f"{op}: k_starts must be [S*m] for S={shards} shards, m dividing their {tokens} tokens; "
            f"got {tuple(k_starts.shape)}"
        )
    if q_first is not None and q_first.shape != (q.shape[0], q.shape[2]):
        expected = (q.shape[0], q.shape[2])
        raise ValueError(f"{op}: q_first must be [B, Tq] {expected}; got {tuple(q_first.shape)}")
    if not scale > 0:
        raise ValueError(f"{op}: scale must be positive; got {scale}")
    _check_layout(op, q=q, k=k, v=v, **integers)


def _check_layout(op: str, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.numel() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(
                f"{op}: {name}'s last dim must be contiguous; its strides are {tensor.stride()}: "
                "call .contiguous()"
            )
        if tensor.dim() > 2 and tensor.numel() and tensor.stride(-2) >= MAX_STRIDE:
            raise ValueError(
                f"{op}: {name}'s rows must lie less than {MAX_STRIDE} elements apart; its strides are "
                f"{tensor.stride()}: call .contiguous()"
            )


def _check_state(state: AttentionState, q: Tensor) -> None:
    check_tensors("attention_step", [torch.float32], out=state.out, maximum=state.maximum, sum=state.sum)
    shapes = q.shape, q.shape[:-1], q.shape[:-1]
    for tensor, shape in zip(_fields(state), shapes, strict=True):
        assert tensor is not None
        if tensor.shape != shape or not tensor.is_contiguous() or tensor.device != q.device:
            raise ValueError(
                "attention_step: state must be what the step before returned for as many queries; beside q "
                f"{tuple(q.shape)} on {q.device} it has {tuple(tensor.shape)} on {tensor.device}"
            )


def _fields(state: AttentionState | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return (None, None, None) if state is None else (state.out, state.maximum, state.sum)
