"""The tracker equals hand counts; a model's weights, gradients and moments are 1/D on each rank."""

from collections import Counter

import pytest
import torch
from distributed import run_distributed
from parity import MODEL, case
from torch import nn

from megatsp.axes import Axes
from megatsp.model.gpt import count_parameters
from megatsp.model.parallelize import build_model
from megatsp.schema import OptimizerConfig
from megatsp.training.live_bytes import LiveBytes
from megatsp.training.optimizer import AdamW
from megatsp.tsp.partition import take_local


def test_what_is_alive_is_counted_and_what_is_freed_is_not():
    with LiveBytes() as live:
        a = torch.ones(100)  # 400 bytes
        b = a * 2
        assert live.live == {"other": 800}
        del a
        assert live.live == {"other": 400}
        c = b.bfloat16()
        assert live.live == {"other": 600}
        del b, c
    assert live.live == {"other": 0}
    assert live.peak == {"other": 800}


def test_tensors_without_data_are_not_counted():
    with LiveBytes() as live:
        torch.empty(10, device="meta").add(1)
    assert not live.peak


def test_views_share_and_operations_in_place_add_nothing():
    with LiveBytes() as live:
        a = torch.zeros(10, 10)
        view = a.t()[2:]
        a.add_(1)
        del a
        assert live.live == {"other": 400}  # the whole storage, for the view's sake
        del view
        assert live.live == {"other": 0}


def test_the_peak_is_that_of_the_sum_and_can_start_again():
    with LiveBytes() as live:
        weights = torch.zeros(10)
        live.hold("weights", [weights])
        torch.zeros(100).sum()
        assert live.peak == {"weights": 40, "other": 404}
        live.start_again()
        assert live.peak == {"weights": 40, "other": 0}
        torch.zeros(5).neg_()
        assert live.peak == {"weights": 40, "other": 20}


def test_a_step_by_hand():
    """The gradient becomes one when autograd has stored it, and is gone when it is dropped."""
    linear = nn.Linear(8, 4, bias=False)  # 128 bytes
    with LiveBytes() as live:
        live.hold_model(linear)
        x = torch.ones(16, 8)  # 512 bytes
        y = linear(x)  # 256
        assert live.live == {"weights": 128, "other": 768}
        y.sum().backward()
        assert live.live == {"weights": 128, "gradients": 128, "other": 768}
        del x, y
        linear.zero_grad()
    assert +live.live == Counter(weights=128)


def rank_parts(layout: str) -> tuple[dict[str, int], dict[str, int]]:
    """On a rank: bytes alive after a backward, and after the step that drops the gradients."""
    size = torch.distributed.get_world_size()
    case_ = case(size, tsp_layout=layout, ffn_hidden_size=104, vocab_size=132)
    axes = Axes.build(case_.parallel, torch.device("cpu"))
    with LiveBytes() as live:
        gpt = build_model(case_.config(), axes)
        optimizer = AdamW(gpt, OptimizerConfig())
        live.hold_model(gpt)
        live.hold("optimizer", optimizer.tensors().values())
        ids = take_local(torch.zeros(1, 48, dtype=torch.int64), axes.tsp.rank, size)
        gpt(ids, ids, torch.ones(ids.shape)).sum().backward()
        after_backward = dict(live.live)
        optimizer.step(1e-3)
        return after_backward, dict(live.live)


@pytest.mark.parametrize("layout", ["hidden", "owner"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_weights_gradients_and_moments_are_one_dth(size, layout):
    model = case(1, ffn_hidden_size=104, vocab_size=132).model
    assert model != MODEL and not model.add_qkv_bias
    share = 4 * count_parameters(model) // size
    for after_backward, after_step in run_distributed(rank_parts, size, layout):
        assert {k: after_backward[k] for k in ("weights", "gradients", "optimizer")} == {
            "weights": share, "gradients": share, "optimizer": 2 * share,
        }  # fmt: skip
        assert (after_step["weights"], after_step["gradients"]) == (share, 0)
