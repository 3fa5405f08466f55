"""Linear cross-entropy by Triton: a vocabulary bucket's steps, and the whole as one differentiable loss.

The backward writes dlogits, a chunk of columns at a time, into a workspace, and multiplies them. It could
do without: by adding each tile's share of dx to memory in whatever order tiles come, as the paper's
kernels do, which gives other bits each time; or by computing the logits once for dx and once for dw, a
product more than here.

Source: Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models, arXiv:2411.09009; chunks:
Hsu et al., Liger Kernel, arXiv:2410.10989.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from megatsp_kernels.common import check_factor, check_tensors
from megatsp_kernels.linear_cross_entropy import buckets

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WORKSPACE_BYTES = 256 << 20


def cross_entropy_step(
    x: Tensor, w: Tensor, targets: Tensor, start: int, lse: Tensor, target_logit: Tensor
) -> None:
    """The forward over one vocabulary bucket, into what is carried from bucket to bucket.

    Allocates 8 n bytes for each of the bucket's splits (at most one a compute unit), and no logits. Fast
    where h, m and w's strides are multiples of 16 (of odd ones, elements are loaded one by one).

    Args:
        x: [n, h], contiguous; fp32, fp16 or bf16.
        w: [h, m] in x's dtype, the weights of m vocabulary rows; one of its dims is contiguous.
        targets: [n], int64. One outside [start, start + m) is not this bucket's.
        start: the bucket's first vocabulary row.
        lse: [n], fp32; becomes logaddexp(lse, logsumexp(x w)). -inf before the first bucket.
        target_logit: [n], fp32; set where the target is this bucket's, elsewhere left.
    Raises:
        ValueError: another dtype, shape, stride or device, no GPU, or no triton.
    Source: the module's, section 4.2.
    """
    _check("cross_entropy_step", x, w, targets, lse=lse, target_logit=target_logit)
    _step(x, w, targets, start, lse, target_logit)


def cross_entropy_backward_step(
    x: Tensor,
    w: Tensor,
    targets: Tensor,
    start: int,
    lse: Tensor,
    a: Tensor,
    b: Tensor,
    dx: Tensor | None = None,
    dw: Tensor | None = None,
    workspace_bytes: int = WORKSPACE_BYTES,
    need_dw: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """The gradients of one vocabulary bucket: dx += dlogits w^T and dw = x^T dlogits, summed in fp32.

    dlogits[i, j] = a[i] softmax[i, j] - b[i] [start + j == targets[i]]. They exist in x's dtype, a chunk of
    columns at a time, so that dw is summed over all rows at once and needs no buffer in fp32.
    Allocates min(workspace_bytes, n m itemsize), and what is not given. The same arguments give the same
    bits; another workspace_bytes rounds dx differently.

    Args:
        x, w, targets, start: as `cross_entropy_step`. Scaling against fp16's underflow is the caller's.
        lse: [n], fp32, over ALL buckets.
        a, b: [n], fp32. A row where both are 0 is ignored: its dlogits are exactly 0.
        dx: [n, h], fp32, contiguous, to be added to; None: a new one.
        dw: [h, m], fp32 or x's dtype, one dim contiguous, to be overwritten; None: a new one in x's dtype
            that lies as w does.
        workspace_bytes: at least one column's, n itemsize.
        need_dw: without, dw is neither computed nor made: of frozen weights.
    Returns:
        dx and dw, or None.
    Raises:
        ValueError: as `cross_entropy_step`, a workspace too small for a column, or a dw that is not needed.
    """
    op = "cross_entropy_backward_step"
    _check(op, x, w, targets, lse=lse, a=a, b=b)
    buckets.chunk_columns(x.shape[0], w.shape[1], x.element_size(), workspace_bytes)
    add = dx is not None
    if dx is None:
        dx = torch.empty_like(x, dtype=torch.float32)
    if dw is None and need_dw:
        dw = _like(w)
    check_tensors(op, (torch.float32,), dx=dx, lse=lse)
    if dw is not None:
        _check_dw(op, x, w, dw, need_dw)
    if dx.shape != x.shape or not dx.is_contiguous():
        raise ValueError(f"{op}: dx must be contiguous {tuple(x.shape)} as x; got {_described(dx)}")
    _backward_step(x, w, targets, start, lse, a, b, dx, dw, add, workspace_bytes)
    return dx, dw


def _check_dw(op: str, x: Tensor, w: Tensor, dw: Tensor, needed: bool) -> None:
    if not needed:
        raise ValueError(f"{op}: dw is given, but need_dw=False; give one or the other")
    check_tensors(op, (torch.float32, x.dtype), dw=dw, x=x)
    if dw.shape != w.shape or not _one_dim_contiguous(dw):
        raise ValueError(
            f"{op}: dw must be {tuple(w.shape)} as w with one dim contiguous; got {_described(dw)}"
        )


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    num_buckets: int = 1,
) -> Tensor:
    """lse - target's logit + z_loss lse^2 of each row of the logits x weight^T. Differentiable.

    Beside its results and gradients the forward allocates 8 n (splits + 1) bytes, and the backward dx in
    fp32 and min(256 MiB, n V / num_buckets itemsize).

    Args:
        x: [n, h], contiguous; fp32, fp16 or bf16.
        weight: [V, h] in x's dtype, one dim contiguous (so the transpose of an [h, V] will do).
        targets: [n], int64. Where ignore_index, loss and gradients are 0. Any other outside [0, V) reads
            nothing: that row's loss and gradients are NaN, without the wait that an exception would need.
        z_loss: weight of lse^2, which keeps logits small.
        num_buckets: passes over V / num_buckets vocabulary rows each.
    Returns:
        [n], fp32.
    Raises:
        ValueError: another dtype, shape, stride or device, no GPU, or no triton.
    Source: the module's; z-loss: Chowdhery et al., PaLM, arXiv:2204.02311, section 5.
    """
    if weight.dim() != 2:
        raise ValueError(f"linear_cross_entropy: weight must be [V, h]; got {_described(weight)}")
    _check("linear_cross_entropy", x, weight.t(), targets)
    if not 1 <= num_buckets <= max(1, weight.shape[0]):
        raise ValueError(
            f"linear_cross_entropy: num_buckets={num_buckets}; it is from 1 to the vocabulary's "
            f"{weight.shape[0]} rows"
        )
    return _loss(x, weight.t(), targets, ignore_index, z_loss, num_buckets)[0]


def _check(op: str, x: Tensor, w: Tensor, targets: Tensor, **vectors: Tensor) -> None:
    check_tensors(op, DTYPES, x=x)
    check_tensors(op, (x.dtype,), x=x, w=w)
    check_tensors(op, (torch.int64,), targets=targets)
    check_tensors(op, (x.dtype, torch.float32, torch.int64), x=x, targets=targets, **vectors)
    check_factor(op, x)
    if x.dim() != 2 or not x.is_contiguous():
        raise ValueError(f"{op}: x must be contiguous [n, h]; got {_described(x)}")
    if w.dim() != 2 or w.shape[0] != x.shape[1] or not _one_dim_contiguous(w):
        raise ValueError(
            f"{op}: w must be [h, m] with h = {x.shape[1]} and one dim contiguous, the other's stride below "
            f"{buckets.MAX_STRIDE}; got {_described(w)}"
        )
    for name, vector in (("targets", targets), *vectors.items()):
        dtype = torch.int64 if name == "targets" else torch.float32
        if vector.dtype != dtype or vector.shape != x.shape[:1] or not vector.is_contiguous():
            raise ValueError(
                f"{op}: {name} must be contiguous {str(dtype).removeprefix('torch.')} [{x.shape[0]}], one a "
                f"row of x; got {_described(vector)}"
            )


def _described(tensor: Tensor) -> str:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{dtype} {tuple(tensor.shape)} with strides {tensor.stride()}"


def _one_dim_contiguous(w: Tensor) -> bool:
    """Rows or columns are, and do not overlap. (A dim of one has no stride.)"""
    (h, m), (row, column) = w.shape, w.stride()
    return any(
        (inner == 1 or length <= 1) and (count <= 1 or length <= outer < buckets.MAX_STRIDE)
        for inner, length, outer, count in ((column, m, row, h), (row, h, column, m))
    )


def _like(w: Tensor) -> Tensor:
    """A new [h, m] that lies as w does."""
    h, m = w.shape
    return w.new_empty(h, m) if w.stride(1) == 1 else w.new_empty(m, h).t()


@torch.library.custom_op("megatsp::cross_entropy_step", mutates_args=("lse", "target_logit"))
def _step(x: Tensor, w: Tensor, targets: Tensor, start: int, lse: Tensor, target_logit: Tensor) -> None:
    buckets.forward(x, w, targets, start, lse, target_logit)


@torch.library.custom_op("megatsp::cross_entropy_backward_step", mutates_args=("dx", "dw"))
def _backward_step(
    x: Tensor,
    w: Tensor,
    targets: Tensor,
    start: int,
    lse: Tensor,
    a: Tensor,
    b: Tensor,
    dx: Tensor,
    dw: Tensor | None,
    add: bool,
    workspace_bytes: int,
) -> None:
    buckets.backward(x, w, targets, start, lse, a, b, dx, dw, add, workspace_bytes)


@torch.library.custom_op("megatsp::linear_cross_entropy", mutates_args=())
def _loss(
    x: Tensor, w: Tensor, targets: Tensor, ignore_index: int, z_loss: float, num_buckets: int
) -> tuple[Tensor, Tensor]:
    """The losses, and lse for the backward."""
    lse = x.new_full(x.shape[:1], float("-inf"), dtype=torch.float32)
    losses = torch.zeros_like(lse)  # the targets' logits at first
    for start, stop in _cuts(w.shape[1], num_buckets):
        buckets.forward(x, w[:, start:stop], targets, start, lse, losses)
    torch.sub(lse, losses, out=losses)
    if z_loss:
        losses.addcmul_(lse, lse, value=z_loss)
    return _weighted(losses, targets, ignore_index, w.shape[1]), lse


@torch.library.custom_op("megatsp::linear_cross_entropy_backward", mutates_args=())
def _loss_backward(
    dlosses: Tensor,
    x: Tensor,
    w: Tensor,
    targets: Tensor,
    lse: Tensor,
    ignore_index: int,
    z_loss: float,
    num_buckets: int,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor]:
    """dx and dw; an empty tensor for one that is not needed."""
    b = _weighted(dlosses.clone(), targets, ignore_index, w.shape[1])
    a = _weighted(dlosses * (1 + 2 * z_loss * lse), targets, ignore_index, w.shape[1])
    dx = torch.empty_like(x, dtype=torch.float32) if need_dx else None
    dw = _like(w) if need_dw else None
    for start, stop in _cuts(w.shape[1], num_buckets):
        part = None if dw is None else dw[:, start:stop]
        buckets.backward(x, w[:, start:stop], targets, start, lse, a, b, dx, part, start > 0, WORKSPACE_BYTES)
    return x.new_empty(0) if dx is None else dx.to(x.dtype), x.new_empty(0) if dw is None else dw


def _cuts(columns: int, num_buckets: int) -> Iterator[tuple[int, int]]:
    """First and last column of each bucket; their sizes differ by at most one."""
    return pairwise(i * columns // num_buckets for i in range(num_buckets + 1))


def _weighted(values: Tensor, targets: Tensor, ignore_index: int, vocabulary: int) -> Tensor:
    """In place: 0 in ignored rows, NaN in those whose target is not in the vocabulary."""
    values.masked_fill_((targets < 0) | (targets >= vocabulary), float("nan"))
    return values.masked_fill_(targets == ignore_index, 0.0)


def _written(*arguments: Any) -> None:
    """Both only write into their arguments."""


_step.register_fake(_written)
_backward_step.register_fake(_written)


@_loss.register_fake
def _(
    x: Tensor, w: Tensor, targets: Tensor, ignore_index: int, z_loss: float, num_buckets: int
) -> tuple[Tensor, Tensor]:
    lse = x.new_empty(x.shape[:1], dtype=torch.float32)
    return lse, torch.empty_like(lse)


@_loss_backward.register_fake
def _(
    dlosses: Tensor,
    x: Tensor,
    w: Tensor,
    targets: Tensor,
    lse: Tensor,
    ignore_index: int,
    z_loss: float,
    num_buckets: int,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x) if need_dx else x.new_empty(0), _like(w) if need_dw else x.new_empty(0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, w, targets, *ctx.options = inputs
    ctx.save_for_backward(x, w, targets, output[1])
    ctx.mark_non_differentiable(output[1])


def _gradient(ctx: Any, dlosses: Tensor, dlse: None) -> tuple[Tensor | None, ...]:
    del dlse
    need_dx, need_dw = ctx.needs_input_grad[:2]
    dx, dw = _loss_backward(dlosses, *ctx.saved_tensors, *ctx.options, need_dx, need_dw)
    return dx if need_dx else None, dw if need_dw else None, None, None, None, None


_loss.register_autograd(_gradient, setup_context=_save)
