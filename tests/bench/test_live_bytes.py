"""The tracker equals hand counts; a model's weights, gradients and moments are 1/D on each rank."""

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import run_distributed
from parity import MODEL, case
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import fully_shard

from megatsp.axes import Axes
from megatsp.bench.live_bytes import LiveBytes
from megatsp.bench.memory import fake_group
from megatsp.comm import Comm
from megatsp.model.gpt import count_parameters
from megatsp.model.parallelize import build_model
from megatsp.schema import OptimizerConfig
from megatsp.training.optimizer import AdamW


@pytest.fixture(params=["real", "fake"])
def tensors(request):
    """A test that asks for it runs twice: on tensors with memory and on tensors without."""
    if request.param == "real":
        yield
    else:
        with FakeTensorMode():
            yield


def test_what_is_alive_is_counted_and_what_is_freed_is_not(tensors):
    with LiveBytes() as live:
        a = torch.ones(100)  # 400 bytes
        b = a * 2
        assert live.live == {"activations": 800}
        del a
        assert live.live == {"activations": 400}
        c = b.bfloat16()
        assert live.live == {"activations": 600}
        del b, c
    assert live.live == {"activations": 0}
    assert live.peak == {"activations": 800}


def test_tensors_without_data_are_not_counted():
    with LiveBytes() as live:
        torch.empty(10, device="meta").add(1)
    assert not live.peak


def test_views_share_and_operations_in_place_add_nothing(tensors):
    with LiveBytes() as live:
        a = torch.zeros(10, 10)
        view = a.t()[2:]
        a.add_(1)
        del a
        assert live.live == {"activations": 400}  # the whole storage, for the view's sake
        del view
        assert live.live == {"activations": 0}


def test_the_peak_is_that_of_the_sum_and_can_start_again(tensors):
    with LiveBytes() as live:
        weights = torch.zeros(10)
        live.hold("weights", [weights])
        torch.zeros(100).sum()
        assert live.peak == {"weights": 40, "activations": 404}
        live.start_again()
        assert live.peak == {"weights": 40, "activations": 0}
        torch.zeros(5).neg_()
        assert live.peak == {"weights": 40, "activations": 20}


def test_a_step_by_hand(tensors):
    """The gradient becomes one when autograd has stored it, and is gone when it is dropped."""
    linear = nn.Linear(8, 4, bias=False)  # 128 bytes
    with LiveBytes() as live:
        live.hold_model(linear)
        x = torch.ones(16, 8)  # 512 bytes
        y = linear(x)  # 256
        assert live.live == {"weights": 128, "activations": 768}
        y.sum().backward()
        assert live.live == {"weights": 128, "gradients": 128, "activations": 768}
        del x, y
        linear.zero_grad()
    assert +live.live == Counter(weights=128)


def test_a_storage_is_followed_when_it_is_emptied_and_filled_again(tensors):
    original = torch.UntypedStorage.resize_
    a, never_seen, weights = (torch.zeros(n) for n in (100, 10, 1))
    with LiveBytes() as live:
        live.hold("weights", [weights])
        a.add_(1)
        a.untyped_storage().resize_(0)
        assert +live.live == Counter(weights=4)
        a.untyped_storage().resize_(400)
        assert +live.live == Counter(weights=4, communication=400)
        never_seen.untyped_storage().resize_(80)
        weights.untyped_storage().resize_(8)  # stays what it was held as
        assert +live.live == Counter(weights=8, communication=480)
        assert live.peak == live.live
        del a, never_seen
    assert +live.live == Counter(weights=8)
    assert torch.UntypedStorage.resize_ is original


def test_fsdps_parameters_are_weights_and_gathered_they_are_communication():
    """On a group without peers, where no thread of gloo's holds a tensor longer than needed."""
    with fake_group(2, 0):
        linear = nn.Linear(8, 4, bias=False)  # 64 bytes a rank
        fully_shard(linear, reshard_after_forward=False)
        with LiveBytes() as live:
            live.hold_model(linear)
            for _ in range(2):
                x = torch.ones(16, 8)  # 512 bytes
                assert +live.live == Counter(weights=64, activations=512)
                y = linear(x)  # 256 bytes
                gathered = +live.live
                y.sum().backward()
                del x, y
                assert +live.live == Counter(weights=64, gradients=64)
                linear.zero_grad()
    assert gathered == Counter(weights=64, communication=128, activations=768)


def rank_kinds() -> list[dict[str, int]]:
    """On a rank: kinds after a collective has touched an activation, a weight and a gradient."""
    found = []
    with LiveBytes() as live:
        activation, weight, gradient = (torch.zeros(n) for n in (4, 8, 16))
        live.hold("weights", [weight])
        live.hold("gradients", [gradient])
        found.append(+live.live)
        for tensor in (activation, weight, gradient):
            dist.all_reduce(tensor)
        activation.add_(1)
        found.append(+live.live)
        live.hold("gradients", [activation])
        found.append(+live.live)
    return [dict(kinds) for kinds in found]


def test_what_a_collective_touches_is_communication_unless_it_is_held():
    for before, after, held in run_distributed(rank_kinds, 2):
        assert before == {"activations": 16, "weights": 32, "gradients": 64}
        assert after == {"communication": 16, "weights": 32, "gradients": 64}
        assert held == {"weights": 32, "gradients": 80}


def rank_moved() -> list[tuple[str, int, int]]:
    """On a rank: each of Comm's collectives, the bytes that Comm counted and those that dispatch did."""
    comm = Comm(dist.group.WORLD)
    whole = torch.zeros(comm.size, 12)
    posts: dict[str, Any] = {
        "all_gather": lambda: comm.all_gather(torch.zeros(3, 5), "").wait(),
        "reduce_scatter": lambda: comm.reduce_scatter(whole, "").wait(),
        "all_reduce": lambda: comm.all_reduce(torch.zeros(7), "").wait(),
        "all_to_all": lambda: comm.all_to_all(whole.bfloat16(), "").wait(),
        "broadcast": lambda: comm.broadcast(whole, 1, "").wait(),
        "reduce": lambda: comm.reduce(whole, 1, "").wait(),
        "send_recv": lambda: comm.shift(torch.zeros(9), torch.zeros(9), "").wait(),
    }
    found = []
    for name, post in posts.items():
        comm.traffic.bytes.clear()
        with LiveBytes() as live:
            post()
        assert set(live.moved) <= {name}
        found.append((name, comm.traffic.bytes.total(), live.moved[name]))
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_moved_bytes_are_those_that_comm_counts(size):
    for rank, counts in enumerate(run_distributed(rank_moved, size)):
        for name, by_comm, by_dispatch in counts:
            assert by_comm == by_dispatch, name
            assert by_comm > 0 or (rank == 1 and name in ("broadcast", "reduce")), name


def rank_moved_by_others() -> dict[str, int]:
    """On one of two ranks: collectives that Comm does not post."""
    parts: list[Tensor] = [torch.zeros(10), torch.zeros(10)]
    with LiveBytes() as live:
        dist.all_gather(parts, torch.zeros(10))  # 40 bytes arrive
        if dist.get_rank() == 0:  # keeps 1 of 4 elements
            dist.all_to_all_single(torch.zeros(3), torch.zeros(4), [1, 2], [1, 3])
        else:  # keeps 2 of 4
            dist.all_to_all_single(torch.zeros(5), torch.zeros(4), [3, 2], [2, 2])
        torch.ops._c10d_functional.wait_tensor(
            torch.ops._c10d_functional.all_gather_into_tensor(torch.zeros(5), 2, dist.group.WORLD.group_name)
        )  # 20 bytes arrive
        dist.barrier()
    return dict(live.moved)


def test_collectives_are_counted_whoever_posts_them():
    first, last = run_distributed(rank_moved_by_others, 2)
    assert first == {"all_gather": 60, "all_to_all": 12}
    assert last == {"all_gather": 60, "all_to_all": 8}


def rank_gather_object() -> str:
    with LiveBytes():
        try:
            dist.gather(torch.zeros(1), [torch.zeros(1)] * 2 if dist.get_rank() == 0 else None)
        except NotImplementedError as error:
            return str(error)
    return ""


def test_a_collective_of_unknown_bytes_is_refused():
    assert all("gather_" in message for message in run_distributed(rank_gather_object, 2))


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
        ids = axes.take_local(torch.zeros(1, 48, dtype=torch.int64))
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
