"""Collectives of one group: what arrives where, what is counted, and what misuse raises."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from distributed import run_distributed
from torch import Tensor

import megatsp.comm
from megatsp.comm import Comm, Pending, Traffic, TravellingSum

SIZE = 3
WHOLE = 2 * 5 * SIZE  # elements of three shards [2, 5]

Counted = dict[str, tuple[int, int]]  # label: elements, bytes


def shard(rank: int) -> Tensor:
    return 100.0 * rank + torch.arange(10.0).view(2, 5)


def counted(traffic: Traffic) -> Counted:
    return {label: (traffic.elements[label], traffic.bytes[label]) for label in traffic.elements}


def rank_collectives() -> tuple[dict[str, Tensor], Counted]:
    """On a rank: what every collective gives, and what it counted under its own label."""
    comm = Comm(dist.group.WORLD)
    mine, rows = shard(comm.rank), torch.cat([shard(comm.rank) + 1000 * r for r in range(SIZE)])
    broadcast, reduced = mine.clone(), mine.clone()
    pending = {
        "all_gather": comm.all_gather(mine, "all_gather"),
        "all_gather/bf16": comm.all_gather(mine.t().bfloat16(), "all_gather/bf16"),  # not contiguous
        "reduce_scatter": comm.reduce_scatter(rows, "reduce_scatter"),
        "all_reduce": comm.all_reduce(mine.clone(), "all_reduce"),
        "all_to_all": comm.all_to_all(rows.view(SIZE, 2, 5), "all_to_all"),
        "broadcast": Pending(broadcast, [comm.broadcast(broadcast, 1, "broadcast")], comm.traffic),
        "reduce": Pending(reduced, [comm.reduce(reduced, 2, "reduce")], comm.traffic),
        "then": comm.all_gather(mine, "then").then(lambda whole: whole.sum(0)),
    }
    return {label: p.wait() for label, p in pending.items()}, counted(comm.traffic)


def test_values_elements_and_bytes():
    shards = [shard(r) for r in range(SIZE)]
    for rank, (values, counts) in enumerate(run_distributed(rank_collectives, SIZE)):
        expected = {
            "all_gather": torch.cat(shards),
            "all_gather/bf16": torch.cat([s.t() for s in shards]).bfloat16(),
            "reduce_scatter": sum(s + 1000 * rank for s in shards),
            "all_reduce": sum(shards),
            "all_to_all": torch.stack([s + 1000 * rank for s in shards]),
            "broadcast": shards[1],
            "then": torch.cat(shards).sum(0),
        }
        if rank == 2:  # the others' buffers are scratch
            expected["reduce"] = sum(shards)
        for label, value in expected.items():
            torch.testing.assert_close(values[label], value, rtol=0, atol=0, msg=label)

        others = WHOLE * (SIZE - 1) // SIZE
        assert counts == {
            "all_gather": (others, 4 * others),
            "all_gather/bf16": (others, 2 * others),
            "reduce_scatter": (others, 4 * others),
            "all_reduce": (2 * 6, 4 * 2 * 6),  # two thirds of 10, rounded down, there and back
            "all_to_all": (others, 4 * others),
            "then": (others, 4 * others),
        } | ({"broadcast": (10, 40)} if rank != 1 else {}) | ({"reduce": (10, 40)} if rank != 2 else {})


def test_a_transfer_is_waited_for_once():
    pending = Pending(torch.ones(2))
    assert torch.equal(pending.wait(), torch.ones(2))
    with pytest.raises(RuntimeError, match="waited for already"):
        pending.wait()


def test_waiting_is_timed_and_taken(monkeypatch):
    clock = [5.0]
    monkeypatch.setattr(megatsp.comm, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    class Slow:
        def wait(self) -> None:
            clock[0] += 0.25

    traffic = Traffic()
    Pending(torch.ones(1), [Slow(), Slow()], traffic).wait()
    clock[0] += 1.0  # computing
    assert traffic.take_exposed_ms() == 500
    assert traffic.take_exposed_ms() == 0


def contribution(rank: int, owner: int) -> Tensor:
    """Of `owner` elements, so rank 0 owns nothing; sums of these depend on their order."""
    return torch.randn(owner, 4, generator=torch.Generator().manual_seed(10 * rank + owner))


def rank_travelling_sum() -> tuple[Tensor, Counted]:
    comm = Comm(dist.group.WORLD)
    owner = lambda step: (comm.rank - step) % comm.size  # noqa: E731
    travelling = TravellingSum(comm, "sum")
    for step in range(comm.size):
        travelling.add(step, contribution(comm.rank, owner(step)), (owner((step + 1) % comm.size), 4))
    return travelling.total(), counted(comm.traffic)


@pytest.mark.parametrize("size", [1, 3, 4])
def test_travelling_sum_starts_after_its_owner_and_ends_there(size):
    reordered = False
    for owner, (total, counts) in enumerate(run_distributed(rank_travelling_sum, size)):
        order = [(owner + 1 + i) % size for i in range(size)]
        expected = contribution(order[0], owner)
        for rank in order[1:]:
            expected = expected + contribution(rank, owner)
        assert torch.equal(total, expected)
        reordered |= not torch.equal(total, sum(contribution(r, owner) for r in range(size)))
        # D-1 sums arrive, every one but the previous rank's own.
        rows = sum(range(size)) - (owner - 1) % size if size > 1 else 0
        assert counts == ({"sum": (4 * rows, 16 * rows)} if size > 1 else {})
    assert reordered == (size > 1), "the order of these sums does not show"


def rank_shift() -> tuple[Tensor, Counted]:
    """Rank p sends p elements, so what rank 0 sends, and rank 1 receives, does not travel."""
    comm = Comm(dist.group.WORLD)
    outgoing = torch.full((comm.rank,), float(comm.rank))
    arrived = comm.shift(outgoing, torch.empty((comm.rank - 1) % comm.size), "hop").wait()
    return arrived, counted(comm.traffic)


def test_shift_with_empty_tensors():
    for rank, (arrived, counts) in enumerate(run_distributed(rank_shift, SIZE)):
        before = (rank - 1) % SIZE
        assert torch.equal(arrived, torch.full((before,), float(before)))
        assert counts == {"hop": (before, 4 * before)}


def rank_alone() -> tuple[list[bool], Counted]:
    results = []
    traffic = Traffic()
    for comm in (Comm(None, traffic), Comm(dist.group.WORLD, traffic)):
        for operation in (comm.all_gather, comm.reduce_scatter, comm.all_reduce, comm.all_to_all):
            given = shard(0).t()  # not contiguous: even so nothing is copied
            results.append(operation(given, "alone").wait() is given)
    return results, counted(traffic)


def test_a_group_of_one_copies_and_sends_nothing():
    ((same, counts),) = run_distributed(rank_alone, 1)
    assert same == [True] * 8
    assert counts == {}
