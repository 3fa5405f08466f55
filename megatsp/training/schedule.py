"""The learning rate of every iteration: linear warm-up, then cosine, linear, WSD or constant."""

import math

from megatsp.schema import OptimizerConfig, SchedulerConfig


def learning_rate(iteration: int, optimizer: OptimizerConfig, scheduler: SchedulerConfig) -> float:
    """Learning rate of `iteration`, counted from 1.

    Warm-up reaches `lr` at iteration lr_warmup_iters; the decay reaches `min_lr` at lr_decay_iters
    and stays there. WSD holds `lr` and falls linearly over its last lr_wsd_decay_iters.

    Source: cosine, Loshchilov & Hutter, arXiv:1608.03983; WSD, Hu et al., arXiv:2404.06395.
    """
    peak, low = optimizer.lr, scheduler.min_lr
    if iteration <= scheduler.lr_warmup_iters:
        return peak * iteration / scheduler.lr_warmup_iters
    style, end = scheduler.lr_decay_style, scheduler.lr_decay_iters
    if style == "constant":
        return peak
    start = end - scheduler.lr_wsd_decay_iters if style == "WSD" else scheduler.lr_warmup_iters
    done = min(max(iteration - start, 0) / max(end - start, 1), 1.0)
    remaining = 0.5 * (1 + math.cos(math.pi * done)) if style == "cosine" else 1 - done
    return low + (peak - low) * remaining
