"""Rotary position embedding, by Triton, in the rotate-half convention of Hugging Face checkpoints.

Source: Su et al., arXiv:2104.09864.
"""

from typing import Any

import torch
from torch import Tensor

from megatsp_kernels.common import check_tensors, choose, launch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LIMIT = 1024  # the widest head: its pairs fit a tile


def rotate(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False, out: Tensor | None = None) -> Tensor:
    """Rotates the pairs (i, i + d/2) of x by the angles of its tokens; computed in fp32.

    Differentiable without `out`: the gradient is the inverse rotation.

    Args:
        x: [B, H, T, d], d even and at most 1024; fp32, fp16 or bf16; any strides with a contiguous last dim.
        cos, sin: fp32 [T, d/2], or [B, 1, T, d/2] where the samples' angles differ; contiguous.
        inverse: rotates back.
        out: [B, H, T, d] to write into, with a dtype and strides of its own; x itself, or memory that
            does not overlap x.
    Returns:
        `out`, or a new tensor like x.
    Raises:
        ValueError: another dtype, shape or stride, a gradient asked of `out`, no GPU, or no triton.
    """
    check_tensors("rotate", DTYPES, x=x)
    check_tensors("rotate", [torch.float32], cos=cos, sin=sin)
    _check_shapes(x, cos, sin)
    if out is None:
        return _rotate(x, cos, sin, inverse)
    check_tensors("rotate", DTYPES, x=x, out=out)
    if out.shape != x.shape:
        raise ValueError(f"rotate: out must be as x, {tuple(x.shape)}; got {tuple(out.shape)}")
    _check_strides("out", out)
    if any(stride == 0 and size > 1 for size, stride in zip(out.shape, out.stride(), strict=True)):
        raise ValueError(f"rotate: out has strides {out.stride()}: an expanded tensor cannot be written to")
    if torch.is_grad_enabled() and (x.requires_grad or out.requires_grad):
        raise ValueError("rotate: with out it has no gradient: leave out away, or call it under no_grad")
    _rotate_into(x, cos, sin, inverse, out)
    return out


def _check_shapes(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    if x.dim() != 4 or x.shape[-1] % 2 or not 2 <= x.shape[-1] <= LIMIT:
        raise ValueError(f"rotate: x must be [B, H, T, d], d even, from 2 to {LIMIT}; got {tuple(x.shape)}")
    of_all = x.shape[2], x.shape[3] // 2
    expected = (x.shape[0], 1, *of_all) if cos.dim() == 4 else of_all
    for name, table in (("cos", cos), ("sin", sin)):
        if tuple(table.shape) != expected or not table.is_contiguous():
            raise ValueError(
                f"rotate: {name} must be contiguous and {expected} beside x {tuple(x.shape)}; "
                f"got {tuple(table.shape)} with strides {table.stride()}"
            )
        if table.device != x.device:
            raise ValueError(f"rotate: {name} is on {table.device}, x on {x.device}")
    _check_strides("x", x)


def _check_strides(name: str, tensor: Tensor) -> None:
    if tensor.stride(-1) != 1:
        raise ValueError(
            f"rotate: the last dim of {name} must be contiguous; got strides {tensor.stride()}: "
            "call contiguous()"
        )


@torch.library.custom_op("megatsp::rotate", mutates_args=())
def _rotate(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    out = torch.empty_like(x)
    _launch(x, cos, sin, inverse, out)
    return out


@torch.library.custom_op("megatsp::rotate_", mutates_args=("out",))
def _rotate_into(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool, out: Tensor) -> None:
    _launch(x, cos, sin, inverse, out)


def _launch(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool, out: Tensor) -> None:
    from megatsp_kernels.rotary.triton import TABLE, rotate_kernel

    batch, heads, tokens, pairs = *x.shape[:3], x.shape[3] // 2
    width = 1 << (pairs - 1).bit_length()
    blocks = choose(TABLE, x.device)[0].blocks
    samples = cos.dim() == 4
    by_heads = batch * -(-heads // blocks["HEADS"]) if samples else -(-batch * heads // blocks["HEADS"])
    grid = -(-tokens // max(1, blocks["TILE"] // width)), by_heads
    sizes = batch * heads, heads, tokens, *x.stride()[:3], *out.stride()[:3]
    constants: dict[str, Any] = dict(PAIRS=pairs, WIDTH=width, INVERSE=inverse, SAMPLES=samples)
    launch(rotate_kernel, grid, TABLE, x, cos, sin, out, *sizes, **constants)


@_rotate.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    return torch.empty_like(x)


@_rotate_into.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool, out: Tensor) -> None:
    return None


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, bool], output: Tensor) -> None:
    del output
    _, cos, sin, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _gradient(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None, None]:
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    return _rotate(dout, *ctx.saved_tensors, not ctx.inverse), None, None, None


_rotate.register_autograd(_gradient, setup_context=_save)
