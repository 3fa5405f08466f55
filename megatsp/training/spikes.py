"""Losses that leap: held against the median of the recent ones, in robust standard deviations."""

import math
import statistics
from collections.abc import Sequence

from megatsp.checkpoint.state import RunState
from megatsp.schema import TrainerConfig

MIN_LOSSES = 16  # fewer say nothing of what is usual


def is_spike(loss: float, recent: Sequence[float], deviations: float) -> bool:
    """Whether `loss` is so many times 1.4826 MAD above the median of the recent ones.

    Source: 1.4826 times the median absolute deviation is the standard deviation of a normal distribution;
    Rousseeuw and Croux, Alternatives to the median absolute deviation (1993).
    """
    if not deviations or len(recent) < MIN_LOSSES:
        return False
    median = statistics.median(recent)
    scale = 1.4826 * statistics.median(abs(each - median) for each in recent)
    return scale > 0 and loss > median + deviations * scale


def with_loss(state: RunState, loss: float, settings: TrainerConfig) -> tuple[float, ...]:
    """The recent losses after this one.

    Spikes are among them, also those that are skipped: a level that stays is some day the usual one.
    """
    if not settings.spike_deviations or not math.isfinite(loss):
        return tuple(state.recent_losses)
    return (*state.recent_losses, loss)[-settings.spike_window :]
