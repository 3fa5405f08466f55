"""Exposed communication: of intervals, and of waits on real ranks."""

import time

import pytest
import torch
import torch.distributed as dist
from distributed import run_distributed

from megatsp.bench.exposed import timed_waits, uncovered
from megatsp.bench.measure import Speed, measure_speed
from megatsp.bench.step import TrainStep
from megatsp.compose import compose
from megatsp.validate import validate


@pytest.mark.parametrize(
    ("communication", "computation", "expected"),
    [
        ([], [(0, 9)], 0),
        ([(0, 4)], [], 4),
        ([(0, 4)], [(4, 8)], 4),
        ([(0, 4)], [(1, 3)], 2),
        ([(1, 3)], [(0, 4)], 0),
        ([(0, 4), (2, 6)], [], 6),  # two at once wait once
        ([(2, 6), (0, 4)], [(3, 5), (3, 4), (9, 12)], 4),
        ([(0, 2), (5, 7)], [(1, 6)], 2),
    ],
)
def test_uncovered_length(communication, computation, expected):
    assert uncovered(communication, computation) == expected
    assert uncovered(iter(communication), iter(computation)) == expected


class LateStep(TrainStep):
    """Its last rank comes a tenth of a second late to every step."""

    def run(self):
        if dist.get_rank() == dist.get_world_size() - 1:
            time.sleep(0.1)
        return super().run()


def late_speed(parallel: list[str]) -> Speed:
    tiny = [
        "model.num_layers=1", "model.hidden_size=32", "model.ffn_hidden_size=32", "model.kv_channels=8",
        "trainer.seq_length=32", "trainer.micro_batch_size=1", "trainer.global_batch_size=2",
        "launch.device=cpu",
    ]  # fmt: skip
    return measure_speed(validate(compose([*tiny, *parallel]), dist.get_world_size()), LateStep, 1, 3)


@pytest.mark.parametrize("preset", ["tsp", "fsdp"])
def test_waiting_for_a_late_rank_is_exposed(preset):
    """Also where FSDP2 waits, and in the backward."""
    found, same = run_distributed(late_speed, 2, [f"parallel={preset}"])
    assert found == same
    assert 3 * 0.1 < found.seconds < 30 and found.tokens_per_s == pytest.approx(3 * 64 / found.seconds)
    assert 40 < found.exposed_ms < 1e3 * found.seconds / 3  # mean of two ranks, one of which waits 100 ms


def wait_in_and_out() -> tuple[int, int]:
    with timed_waits() as seconds:
        dist.all_reduce(torch.ones(1))
        dist.all_reduce(torch.ones(1), async_op=True).wait()
        dist.barrier()
    inside = len(seconds)
    dist.barrier()
    return inside, len(seconds)


def test_waits_are_timed_inside_the_block_alone():
    assert run_distributed(wait_in_and_out, 2) == [(3, 3)] * 2
