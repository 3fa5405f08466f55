"""The plain text of what streamed products compute: what op.py is tested against."""

from collections.abc import Sequence

import torch
from torch import Tensor


def bucket(slices: Sequence[Sequence[Tensor]], dtype: torch.dtype) -> Tensor:
    """Every rank's columns [h/D, n_i], cast, side by side; the ranks' rows one after another: [h, R]."""
    return torch.cat([torch.cat([c.to(dtype) for c in columns], 1) for columns in slices])


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a [n, h] times b [h, m], summed in fp32; [n, m] in a's dtype."""
    return _wide(a, b).to(a.dtype)


def gradient(factors: Sequence[tuple[Tensor, Tensor]], rank: int) -> Tensor:
    """The sum over ranks of a [h, n] times b [n, m] in fp32: the rows of h that `rank` owns, [h/D, m]."""
    slices = [_wide(a, b).chunk(len(factors))[rank] for a, b in factors]
    total = torch.zeros_like(slices[0])
    for part in slices:
        total += part
    return total


def _wide(a: Tensor, b: Tensor) -> Tensor:
    wide = torch.promote_types(a.dtype, torch.float32)
    return a.to(wide) @ b.to(wide)
