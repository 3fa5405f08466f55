"""What every kernel's test needs: the device, tensors with poisoned borders, and error bounds."""

from collections.abc import Sequence

import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter multiplies bf16 matrices wrongly and truncates fp32 to bf16, where a GPU rounds
# (triton 3.9): bf16 is tested on a GPU, fp16 stands for it on a CPU.
DTYPES = [torch.float32, torch.bfloat16 if DEVICE.type == "cuda" else torch.float16]
_BORDER = 64  # elements


class Poisoned:
    """Tensors inside larger buffers of NaN: reading past an end spoils the result, writing past it shows.

    `empty` results are NaN themselves, so that what a kernel does not write shows too.
    """

    def __init__(self) -> None:
        self._buffers: list[tuple[Tensor, int]] = []

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        count = torch.Size(shape).numel()
        buffer = torch.full((count + 2 * _BORDER,), float("nan"), dtype=dtype, device=DEVICE)
        self._buffers.append((buffer, count))
        return buffer[_BORDER : _BORDER + count].view(shape)

    def of(self, tensor: Tensor) -> Tensor:
        """A copy of `tensor` on the device, its strides contiguous."""
        copy = self.empty(*tensor.shape, dtype=tensor.dtype)
        return copy.copy_(tensor)

    def check(self) -> None:
        """Asserts that no border was written to."""
        for buffer, count in self._buffers:
            assert buffer[:_BORDER].isnan().all() and buffer[_BORDER + count :].isnan().all()


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal numbers, the same on every device."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def assert_near(ours: Sequence[Tensor], plain: Sequence[Tensor], exact: Sequence[Tensor]) -> None:
    """fp32: within 1e-5 of `exact`'s norm. Lower: at most twice the error of `plain`, the same in torch.

    exact: fp32 or fp64 results from the same (rounded) inputs.
    """
    for mine, theirs, truth in zip(ours, plain, exact, strict=True):
        assert mine.shape == truth.shape and mine.dtype == theirs.dtype
        error, norm = (mine.double() - truth.double()).norm(), truth.double().norm()
        if mine.dtype == torch.float32:
            assert error <= 1e-5 * norm + 1e-12, f"relative error {error / norm:.1e}"
        else:
            bound = 2 * (theirs.double() - truth.double()).norm() + 1e-6 * norm
            assert error <= bound, f"error {error:.2e}, allowed {bound:.2e}"
