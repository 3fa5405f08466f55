"""Every decay style at its borders, against values worked out by hand."""

import pytest

from megatsp.schema import OptimizerConfig, SchedulerConfig
from megatsp.training.schedule import learning_rate

PEAK, LOW = 1.0, 0.2


@pytest.mark.parametrize(
    ("style", "wsd_iters", "expected"),
    [
        # Warm-up of 4; the decay ends at 12, its middle is 8.
        ("cosine", 0, {4: 1.0, 6: 0.2 + 0.4 * (1 + 0.5**0.5), 8: 0.6, 12: 0.2, 13: 0.2, 1000: 0.2}),
        ("linear", 0, {4: 1.0, 5: 0.9, 8: 0.6, 11: 0.3, 12: 0.2, 13: 0.2, 1000: 0.2}),
        ("WSD", 4, {4: 1.0, 5: 1.0, 8: 1.0, 9: 0.8, 10: 0.6, 12: 0.2, 13: 0.2, 1000: 0.2}),
        ("WSD", 8, {4: 1.0, 5: 0.9, 12: 0.2}),  # the decay follows the warm-up at once
        ("constant", 0, {4: 1.0, 5: 1.0, 12: 1.0, 1000: 1.0}),
    ],
)
def test_styles(style, wsd_iters, expected):
    scheduler = SchedulerConfig(
        style, LOW, lr_warmup_iters=4, lr_decay_iters=12, lr_wsd_decay_iters=wsd_iters
    )
    warmup = {1: 0.25, 2: 0.5, 3: 0.75}
    for iteration, rate in {**warmup, **expected}.items():
        assert learning_rate(iteration, OptimizerConfig(lr=PEAK), scheduler) == pytest.approx(rate), iteration


@pytest.mark.parametrize(("style", "first"), [("cosine", 0.6), ("linear", 0.6), ("constant", 1.0)])
def test_without_warmup_the_decay_begins_at_once(style, first):
    scheduler = SchedulerConfig(style, LOW, lr_decay_iters=2)
    assert learning_rate(1, OptimizerConfig(lr=PEAK), scheduler) == pytest.approx(first)


def test_wsd_over_the_whole_run():
    scheduler = SchedulerConfig("WSD", 0.0, lr_decay_iters=1, lr_wsd_decay_iters=1)
    assert learning_rate(1, OptimizerConfig(lr=PEAK), scheduler) == 0.0
