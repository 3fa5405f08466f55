"""Exposed communication: of intervals, and of waits on real ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import run_distributed
from torch import Tensor
from waiting import wait_until

from megatsp.bench import exposed, measure
from megatsp.bench.exposed import timed_waits, uncovered
from megatsp.bench.measure import Speed
from megatsp.bench.step import TrainStep
from megatsp.compose import compose
from megatsp.schema import Config
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


class Clock:
    """One clock for all ranks, in a file: it goes on where a rank says so, and nowhere else."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def perf_counter(self) -> float:
        return float((self._folder / "time").read_text())

    def go_on(self, seconds: float) -> None:
        (self._folder / "next").write_text(str(self.perf_counter() + seconds))
        (self._folder / "next").replace(self._folder / "time")


class LateStep(TrainStep):
    """Its last rank comes a tenth of a second late to every step, in whose first wait the other one is."""

    def __init__(self, config: Config, device: torch.device, folder: Path) -> None:
        super().__init__(config, device)
        self._folder, self._steps = folder, 0

    def run(self) -> Tensor:
        self._steps += 1
        if dist.get_rank() == dist.get_world_size() - 1:
            wait_until((self._folder / f"waits{self._steps}").exists, "the other rank is in a timed wait")
            Clock(self._folder).go_on(0.1)
            (self._folder / f"came{self._steps}").touch()
        else:
            (self._folder / "step").write_text(str(self._steps))
        return super().run()


def late_speed(parallel: list[str], folder: Path) -> Speed:
    tiny = [
        "model.num_layers=1", "model.hidden_size=32", "model.ffn_hidden_size=32", "model.kv_channels=8",
        "trainer.seq_length=32", "trainer.micro_batch_size=1", "trainer.global_batch_size=2",
        "launch.device=cpu",
    ]  # fmt: skip
    config = validate(compose([*tiny, *parallel]), dist.get_world_size())
    wait, step = dist.Work.wait, folder / "step"

    def wait_for_the_late(work: dist.Work, *args: Any) -> Any:
        if dist.get_rank() == 0 and step.exists():
            (folder / f"waits{step.read_text()}").touch()
            wait_until((folder / f"came{step.read_text()}").exists, "the late rank comes")
        return wait(work, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist.Work, "wait", wait_for_the_late)
        for module in (exposed, measure):
            patch.setattr(module, "time", Clock(folder))
        return measure.measure_speed(config, lambda *given: LateStep(*given, folder), 1, 3)


@pytest.mark.parametrize("preset", ["tsp", "fsdp"])
def test_waiting_for_a_late_rank_is_exposed(preset, tmp_path):
    """Also where FSDP2 waits: a rank that waited elsewhere would never be met."""
    (tmp_path / "time").write_text("5.0")
    found, same = run_distributed(late_speed, 2, [f"parallel={preset}"], tmp_path)
    assert found == same
    assert found.seconds == pytest.approx(3 * 0.1) and found.tokens_per_s == pytest.approx(3 * 64 / 0.3)
    assert found.exposed_ms == pytest.approx(50)  # mean of two ranks, one of which waits 100 ms


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
