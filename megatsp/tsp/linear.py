"""Products that add into fp32: what sums over buckets is summed in fp32."""

import torch
from torch import Tensor


def accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, with a [n, k], b [k, m] in the compute dtype and total [n, m] in fp32."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a b: as `accumulate`, over whatever fp32 `out` held."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)
