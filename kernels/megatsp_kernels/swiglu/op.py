"""SwiGLU with its backward, by Triton.

Source: Shazeer, GLU variants, arXiv:2002.05202.
"""

from typing import Any

import torch
from torch import Tensor

from megatsp_kernels.common import check_tensors, choose, launch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, computed in fp32. Differentiable.

    Args:
        gate_up: [.., 2F], contiguous: the gate's columns, then those of up; fp32, fp16 or bf16.
    Returns:
        [.., F] in the same dtype.
    Raises:
        ValueError: another dtype, an odd last dim, not contiguous, no GPU, or no triton.
    """
    _check(gate_up)
    return _forward(gate_up)


def swiglu_backward(dout: Tensor, gate_up: Tensor, inplace: bool = False) -> tuple[Tensor, Tensor]:
    """The gradient of `gate_up`, like it, and `swiglu(gate_up)` again, like dout [.., F].

    inplace: the first overwrites `gate_up`, the second `dout`.
    Raises: as `swiglu`.
    """
    _check(gate_up)
    check_tensors("swiglu_backward", [gate_up.dtype], gate_up=gate_up, dout=dout)
    expected = (*gate_up.shape[:-1], gate_up.shape[-1] // 2)
    if tuple(dout.shape) != expected or not dout.is_contiguous():
        raise ValueError(
            f"swiglu_backward: dout must be contiguous and {expected} beside gate_up {tuple(gate_up.shape)}; "
            f"got {tuple(dout.shape)} with strides {dout.stride()}"
        )
    if inplace:
        _backward_(dout, gate_up)
        return gate_up, dout
    dgate_up, out = _backward(dout, gate_up)
    return dgate_up, out


def _check(gate_up: Tensor) -> None:
    check_tensors("swiglu", DTYPES, gate_up=gate_up)
    if not gate_up.dim() or gate_up.shape[-1] % 2 or not gate_up.is_contiguous():
        raise ValueError(
            "swiglu: gate_up must be contiguous [.., 2F], gate and up side by side; "
            f"got {tuple(gate_up.shape)} with strides {gate_up.stride()}"
        )


@torch.library.custom_op("megatsp::swiglu", mutates_args=())
def _forward(gate_up: Tensor) -> Tensor:
    from megatsp_kernels.swiglu.triton import TABLE, forward_kernel

    out = gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
    launch(forward_kernel, _grid(out, TABLE), TABLE, gate_up, out, *_size(out))
    return out


@torch.library.custom_op("megatsp::swiglu_backward", mutates_args=())
def _backward(dout: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    dgate_up, out = torch.empty_like(gate_up), torch.empty_like(dout)
    _launch_backward(dout, gate_up, dgate_up, out)
    return dgate_up, out


@torch.library.custom_op("megatsp::swiglu_backward_", mutates_args=("dout", "gate_up"))
def _backward_(dout: Tensor, gate_up: Tensor) -> None:
    _launch_backward(dout, gate_up, gate_up, dout)


def _launch_backward(dout: Tensor, gate_up: Tensor, dgate_up: Tensor, out: Tensor) -> None:
    from megatsp_kernels.swiglu.triton import TABLE, backward_kernel

    launch(backward_kernel, _grid(out, TABLE), TABLE, dout, gate_up, dgate_up, out, *_size(out))


def _size(out: Tensor) -> tuple[int, int]:
    """Rows and columns."""
    columns = out.shape[-1]
    return out.numel() // max(1, columns), columns


def _grid(out: Tensor, table: Any) -> tuple[int, int]:
    config, _ = choose(table, out.device)
    rows, columns = _size(out)
    return -(-rows // config.blocks["ROWS"]), -(-columns // config.blocks["COLUMNS"])


@_forward.register_fake
def _(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


@_backward.register_fake
def _(dout: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(gate_up), torch.empty_like(dout)


@_backward_.register_fake
def _(dout: Tensor, gate_up: Tensor) -> None:
    return None


def _save(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    del output
    ctx.save_for_backward(*inputs)


def _gradient(ctx: Any, dout: Tensor) -> Tensor:
    return _backward(dout.contiguous(), *ctx.saved_tensors)[0]


_forward.register_autograd(_gradient, setup_context=_save)
