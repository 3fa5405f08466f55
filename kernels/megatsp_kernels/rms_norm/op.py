"""RMSNorm with its backward, by Triton; alone, or of a residual sum.

Source: Zhang & Sennrich, arXiv:1910.07467; the order of casts is Hugging Face Llama's.
"""

from typing import Any

import torch
from torch import Tensor

from megatsp_kernels.common import check_tensors, choose, launch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LIMIT = 16384  # the widest row that the registers of one program hold


def rms_norm(x: Tensor, gain: Tensor, epsilon: float) -> Tensor:
    """x / rms(x) * gain: normalised in fp32, rounded to x's dtype, then times the gain in it. Differentiable.

    Args:
        x: [.., n] with n from 1 to 16384; fp32, fp16 or bf16. Its last dim is contiguous; the others
            are rows one stride apart, or two levels of them, as heads in a slice of columns are.
        gain: [n], contiguous; fp32 or x's dtype. Its own gradient takes it unrounded.
    Returns:
        [.., n], contiguous, in x's dtype.
    Raises:
        ValueError: another dtype, shape or stride, no GPU, or no triton.
    """
    _check("rms_norm", gain, x=x)
    return _forward(x, gain, epsilon)


def add_rms_norm(
    x: Tensor, update: Tensor, gain: Tensor, epsilon: float, inplace: bool = False
) -> tuple[Tensor, Tensor]:
    """total = x + update, summed in fp32 and rounded to x's dtype, and `rms_norm` of the total.

    Args:
        x, gain: as in `rms_norm`.
        update: [.., n] like x, or fp32; strides as x's may be.
        inplace: the total overwrites `update`, which then has x's dtype and is contiguous. Without it
            the function is differentiable.
    Returns:
        total and its norm, both [.., n] in x's dtype and contiguous.
    Raises:
        ValueError: as `rms_norm`, or `inplace` where it cannot be.
    """
    op = "add_rms_norm"
    _check(op, gain, x=x, update=update)
    if update.dtype not in (x.dtype, torch.float32):
        raise ValueError(f"{op}: update is {_name(update)}; beside x of {_name(x)} it is that or float32")
    if not inplace:
        total, y = _add_forward(x, update, gain, epsilon)
        return total, y
    if update.dtype != x.dtype or not update.is_contiguous():
        raise ValueError(
            f"{op}: in place, update must be contiguous and of x's dtype {_name(x)}; "
            f"got {_name(update)} with strides {update.stride()}: give inplace=False"
        )
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, update, gain)):
        raise ValueError(f"{op}: in place it has no gradient: give inplace=False, or call it under no_grad")
    return update, _add_forward_(x, update, gain, epsilon)


def rms_norm_backward(
    dy: Tensor, x: Tensor, gain: Tensor, epsilon: float, dresidual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of `rms_norm`, computed in fp32 from x alone; the same inputs give the same bits.

    Args:
        dy: [.., n] like x; fp32, fp16 or bf16; strides as x's may be.
        x, gain: as in `rms_norm`.
        dresidual: added to dx, as dy in shape, dtypes and strides.
    Returns:
        dx [.., n], contiguous, and dgain [n], both fp32.
    Raises: as `rms_norm`.
    """
    tensors = dict(x=x, dy=dy) if dresidual is None else dict(x=x, dy=dy, dresidual=dresidual)
    _check("rms_norm_backward", gain, **tensors)
    dx, dgain = _backward(dy, x, gain, epsilon, dresidual, torch.float32)
    return dx, dgain


def _check(op: str, gain: Tensor, **tensors: Tensor) -> None:
    """All of the first one's shape, rows as the kernels can address them, and a gain that fits."""
    check_tensors(op, DTYPES, **tensors, gain=gain)
    name, x = next(iter(tensors.items()))
    if not x.dim() or not 1 <= x.shape[-1] <= LIMIT:
        raise ValueError(f"{op}: {name} must be [.., n] with n from 1 to {LIMIT}; got {tuple(x.shape)}")
    if gain.dtype not in (x.dtype, torch.float32):
        raise ValueError(f"{op}: gain is {_name(gain)}; beside {name} of {_name(x)} it is that or float32")
    if gain.shape != x.shape[-1:] or not gain.is_contiguous():
        raise ValueError(
            f"{op}: gain must be contiguous [{x.shape[-1]}], the last dim of {name} {tuple(x.shape)}; "
            f"got {tuple(gain.shape)} with strides {gain.stride()}"
        )
    for other, tensor in tensors.items():
        if tensor.shape != x.shape:
            raise ValueError(
                f"{op}: {other} is {tuple(tensor.shape)}; it must be as {name}, {tuple(x.shape)}"
            )
        if _rows(tensor) is None:
            raise ValueError(
                f"{op}: {other} {tuple(tensor.shape)} has strides {tensor.stride()}; its last dim must be "
                "contiguous and the others two strides at most, once merged: call contiguous()"
            )


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _rows(tensor: Tensor) -> tuple[int, int, int] | None:
    """Rows [outer, inner] of the last dim: how many are inner, and both strides; None if they are not so."""
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        return None
    levels: list[list[int]] = []  # [size, stride], neighbours merged, the innermost first
    for size, stride in reversed(list(zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True))):
        if size == 1:
            continue
        if levels and stride == levels[-1][0] * levels[-1][1]:
            levels[-1][0] *= size
        else:
            levels.append([size, stride])
    if not tensor.numel() or not levels:
        return 1, 0, 0
    if len(levels) == 1:
        return 1, levels[0][1], 0
    return (levels[0][0], levels[1][1], levels[0][1]) if len(levels) == 2 else None


def _fit(gradient: Tensor) -> Tensor:
    """As it is, or a copy whose rows the kernels can address."""
    return gradient.contiguous() if _rows(gradient) is None else gradient


def _width(n: int) -> int:
    """n padded to a power of two."""
    return 1 << (n - 1).bit_length()


@torch.library.custom_op("megatsp::rms_norm", mutates_args=())
def _forward(x: Tensor, gain: Tensor, epsilon: float) -> Tensor:
    from megatsp_kernels.rms_norm.triton import FORWARD, forward_kernel, table

    y, n, rows = x.new_empty(x.shape), x.shape[-1], x.numel() // x.shape[-1]
    tiles = table(FORWARD, _width(n))
    args = x, gain, y, epsilon, rows, n, *_strides(x)
    launch(forward_kernel, _grid(rows, n, tiles, x), tiles, *args, WIDTH=_width(n))
    return y


def _launch_add(x: Tensor, update: Tensor, gain: Tensor, total: Tensor, y: Tensor, epsilon: float) -> None:
    from megatsp_kernels.rms_norm.triton import FORWARD, add_forward_kernel, table

    n, rows = x.shape[-1], x.numel() // x.shape[-1]
    tiles = table(FORWARD, _width(n))
    args = x, update, gain, total, y, epsilon, rows, n, *_strides(x), *_strides(update)
    launch(add_forward_kernel, _grid(rows, n, tiles, x), tiles, *args, WIDTH=_width(n))


@torch.library.custom_op("megatsp::add_rms_norm", mutates_args=())
def _add_forward(x: Tensor, update: Tensor, gain: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    total, y = x.new_empty(x.shape), x.new_empty(x.shape)
    _launch_add(x, update, gain, total, y, epsilon)
    return total, y


@torch.library.custom_op("megatsp::add_rms_norm_", mutates_args=("update",))
def _add_forward_(x: Tensor, update: Tensor, gain: Tensor, epsilon: float) -> Tensor:
    y = x.new_empty(x.shape)
    _launch_add(x, update, gain, update, y, epsilon)
    return y


@torch.library.custom_op("megatsp::rms_norm_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, gain: Tensor, epsilon: float, dresidual: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """dx in `dtype`."""
    from megatsp_kernels.rms_norm.triton import BACKWARD, WIDE, backward_kernel, parts_backward_kernel, table

    n, rows = x.shape[-1], x.numel() // x.shape[-1]
    width = _width(n)
    dx = x.new_empty(x.shape, dtype=dtype)
    kernel = backward_kernel if width <= max(BACKWARD) else parts_backward_kernel
    tiles = table(BACKWARD | WIDE, width)
    config, _ = choose(tiles, x.device)
    (count,) = _grid(rows, n, tiles, x)
    count = min(count, config.blocks["PROGRAMS"])
    partial = x.new_empty(count, n, dtype=torch.float32)
    strides = *_strides(dy), *_strides(x), *((1, 0, 0) if dresidual is None else _strides(dresidual))
    launch(
        kernel, (count,), tiles, dy, x, gain, dresidual, dx, partial, epsilon, rows, n, *strides, WIDTH=width
    )
    return dx, partial.sum(0)


def _strides(tensor: Tensor) -> tuple[int, int, int]:
    rows = _rows(tensor)
    assert rows is not None
    return rows


def _grid(rows: int, n: int, tiles: Any, x: Tensor) -> tuple[int]:
    """One program a tile."""
    config, _ = choose(tiles, x.device)
    return (-(-rows // max(1, config.blocks.get("TILE", 1) // _width(n))),)


@_forward.register_fake
def _(x: Tensor, gain: Tensor, epsilon: float) -> Tensor:
    return x.new_empty(x.shape)


@_add_forward.register_fake
def _(x: Tensor, update: Tensor, gain: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


@_add_forward_.register_fake
def _(x: Tensor, update: Tensor, gain: Tensor, epsilon: float) -> Tensor:
    return x.new_empty(x.shape)


@_backward.register_fake
def _(
    dy: Tensor, x: Tensor, gain: Tensor, epsilon: float, dresidual: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[-1], dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
    del output
    x, gain, ctx.epsilon = inputs
    ctx.save_for_backward(x, gain)


def _gradient(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
    x, gain = ctx.saved_tensors
    dx, dgain = _backward(_fit(dy), x, gain, ctx.epsilon, None, x.dtype)
    return dx, dgain.to(gain.dtype), None


def _save_add(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float], output: tuple[Tensor, Tensor]) -> None:
    _, update, gain, ctx.epsilon = inputs
    ctx.update_dtype = update.dtype
    ctx.save_for_backward(output[0], gain)


def _add_gradient(ctx: Any, dtotal: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    total, gain = ctx.saved_tensors
    # Written in fp32 only where update is: the gradient of x is then rounded from it.
    dtotal, dgain = _backward(_fit(dy), total, gain, ctx.epsilon, _fit(dtotal), ctx.update_dtype)
    return dtotal.to(total.dtype), dtotal, dgain.to(gain.dtype), None


_forward.register_autograd(_gradient, setup_context=_save)
_add_forward.register_autograd(_add_gradient, setup_context=_save_add)
