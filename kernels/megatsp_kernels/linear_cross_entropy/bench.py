"""Linear cross-entropy, forward and backward, against torch's with whole logits, and against Liger's."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from megatsp_kernels.benchmark import Benchmark, when_importable
from megatsp_kernels.linear_cross_entropy import (
    cross_entropy_backward_step,
    cross_entropy_step,
    linear_cross_entropy,
)


def benchmarks(smoke: bool = False) -> Iterator[Benchmark]:
    """16K local tokens of 7B, a vocabulary of 32,000 and an eighth of 128,256; smoke: for the interpreter."""
    n, h, vocabulary, bucket = (20, 24, 40, 24) if smoke else (16384, 4096, 32000, 16032)
    dtype = torch.float16 if smoke else torch.bfloat16
    for name, m, make in (("whole", vocabulary, _whole), ("bucket", bucket, _bucket)):
        # The logits once, dx and dw; computing the logits again is ours alone. x and w are read twice, dx is
        # written in x's dtype or, for a bucket, in fp32, dw once; targets and what is carried count too.
        dx_itemsize = 4 if make is _bucket else dtype.itemsize
        size = (2 * n * h + 3 * h * m) * dtype.itemsize + n * h * dx_itemsize + n * (2 * 8 + 6 * 4)
        yield Benchmark(
            f"linear_cross_entropy/{name}", dict(n=n, h=h, m=m), dtype, 6 * n * h * m, size,
            partial(make, n, h, m, dtype),
        )  # fmt: skip


def _inputs(n: int, h: int, m: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """x, w [h, m], targets and the losses' gradients."""
    x = torch.randn(n, h, device=device, dtype=dtype)
    w = torch.randn(h, m, device=device, dtype=dtype) * h**-0.5
    return x, w, torch.randint(m, (n,), device=device), torch.full((n,), 1 / n, device=device)


def _whole(
    n: int, h: int, m: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Callable[[], Any] | str]:
    x, w, targets, dlosses = _inputs(n, h, m, dtype, device)
    leaves = x.requires_grad_(), w.t().contiguous().requires_grad_()

    def run(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Any:
        return torch.autograd.grad(loss(*leaves, targets), leaves, dlosses)

    def liger(module: Any) -> Callable[[], Any]:
        loss = module.LigerFusedLinearCrossEntropyLoss()
        return lambda: torch.autograd.grad(loss(leaves[1], leaves[0], targets), leaves)

    return {
        "megatsp": partial(run, linear_cross_entropy),
        "torch": partial(run, _plain),
        "torch.compile": partial(run, torch.compile(_plain)),
        "liger": when_importable("liger_kernel.transformers", liger),
    }


def _plain(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy((x @ weight.t()).float(), targets, reduction="none")


def _bucket(n: int, h: int, m: int, dtype: torch.dtype, device: torch.device) -> dict[str, Callable[[], Any]]:
    x, w, targets, scale = _inputs(n, h, m, dtype, device)

    def ours() -> Any:
        lse, target_logit = torch.full_like(scale, float("-inf")), torch.zeros_like(scale)
        cross_entropy_step(x, w, targets, 0, lse, target_logit)
        return cross_entropy_backward_step(x, w, targets, 0, lse, scale, scale)

    compiled = torch.compile(_plain_bucket)
    return {
        "megatsp": ours,
        "torch": lambda: _plain_bucket(x, w, targets, scale),
        "torch.compile": lambda: compiled(x, w, targets, scale),
    }


def _plain_bucket(x: Tensor, w: Tensor, targets: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    """A bucket's forward, then its backward from the logits computed again, as without kernels."""
    logits = (x @ w).float()
    lse, target_logit = logits.logsumexp(-1), logits.gather(1, targets[:, None])
    dlogits = ((x @ w).float() - lse[:, None]).exp()
    dlogits = dlogits.scatter_add(1, targets[:, None], -torch.ones_like(target_logit)) * scale[:, None]
    dlogits = dlogits.to(x.dtype)
    return lse, target_logit, (dlogits @ w.t()).float(), x.t() @ dlogits
