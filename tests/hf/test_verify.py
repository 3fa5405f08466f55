"""What the check of a conversion measures, and that no number, however strange, passes by itself."""

import math
from dataclasses import replace

import pytest
import torch

from megatsp.hf.verify import Differences, Report, passed

GOOD = Report(
    "fp32", 8, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0, {"max_difference": 1e-4, "kl": 1e-6, "frequencies": 1e-6}
)


def test_differences_are_measured_from_what_is_expected():
    generator = torch.Generator().manual_seed(1)
    found, expected = torch.randn(2, 2, 3, 5, generator=generator)
    measured = Differences.between(found, expected)
    logs = [t.flatten(0, 1).double().log_softmax(-1) for t in (found, expected)]
    kl = torch.nn.functional.kl_div(*logs, reduction="batchmean", log_target=True)  # of expected from found
    assert measured.kl == pytest.approx(kl.item()) and measured.kl > 0.01
    assert measured.max_difference == (found - expected).abs().max().item()
    assert measured.mean_difference == pytest.approx((found - expected).abs().mean().item())
    assert Differences.between(expected, expected) == Differences(0.0, 0.0, 0.0, 1.0)


@pytest.mark.parametrize("name", ["max_difference", "kl", "frequencies"])
@pytest.mark.parametrize("value", [1.0, math.inf, math.nan])
def test_what_is_beyond_a_bound_or_no_number_fails(name, value):
    assert passed(GOOD) is GOOD
    report = replace(GOOD, **{name: value})
    assert [failure.partition(" ")[0] for failure in report.failures()] == [name]
    with pytest.raises(ValueError, match="the check of the conversion failed"):
        passed(report)
