"""The plain text of rotary position embedding: what op.py is tested against."""

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """Pairs (i, i + d/2) of x [B, H, T, d], in fp32 (fp64: in fp64); angles [T, d/2] or [B, 1, T, d/2]."""
    first, second = (x if x.element_size() > 4 else x.float()).chunk(2, -1)
    sin = -sin if inverse else sin
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)
