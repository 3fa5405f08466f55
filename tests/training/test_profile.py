"""The profiler records the iterations and ranks that it was asked for, and nothing else."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import torch
from distributed import run_distributed

from megatsp.schema import Config, LoggingConfig
from megatsp.training.profile import Profiler


def profiled(folder: Path, steps: range, start: int, end: int, fails_after: int = 0) -> list[str]:
    """On a rank: what is said of iterations that each multiply matrices of their own size."""
    logging = LoggingConfig(profile_step_start=start, profile_step_end=end)
    said: list[str] = []
    try:
        with Profiler(
            replace(Config(), logging=logging), folder, torch.device("cpu"), steps[0] - 1, said.append
        ) as profiler:
            for iteration in steps:
                torch.ones(iteration, iteration) @ torch.ones(iteration, iteration)
                profiler.step(iteration)
                if iteration == fails_after:
                    raise ValueError("the step")
    except ValueError as error:
        assert str(error) == "the step"
    return said


def all_cases(folder: Path) -> list[list[str]]:
    """On a rank: see the test; all in one start."""
    return [
        profiled(folder / "amid", range(1, 8), 3, 4),
        profiled(folder / "first", range(1, 4), 1, 1),
        profiled(folder / "resumed", range(4, 7), 3, 5),
        profiled(folder / "cut", range(1, 4), 3, 9),
        profiled(folder / "over", range(10, 12), 3, 5),
        profiled(folder / "off", range(1, 4), 0, 0),
        profiled(folder / "failed", range(1, 4), 2, 9, fails_after=3),
    ]


def sizes(trace: Path) -> set[int]:
    """Rows of the matrices that a trace says were multiplied."""
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    return {event["args"]["Input Dims"][0][0] for event in events if event.get("name") == "aten::mm"}


def test_the_wanted_iterations_of_the_wanted_ranks(tmp_path):
    first, second = run_distributed(all_cases, 2, tmp_path)
    assert second == [[]] * 7  # profile_ranks is [0]
    expected = {
        "amid": ("rank_00000_iter_0000003-4.json.gz", {3, 4}),
        "first": ("rank_00000_iter_0000001-1.json.gz", {1}),
        "resumed": ("rank_00000_iter_0000004-5.json.gz", {4, 5}),
        "cut": ("rank_00000_iter_0000003-3.json.gz", {3}),
    }
    for (case, (name, recorded)), said in zip(expected.items(), first, strict=False):
        folder = tmp_path / case / "profile"
        assert [path.name for path in folder.iterdir()] == [name]
        assert sizes(folder / name) == recorded
        assert len(said) == 1 and said[0].endswith(str(folder / name))
    assert first[4:] == [[], [], []]
    assert {path.name for path in tmp_path.iterdir()} == expected.keys()


def test_a_folder_that_cannot_be_written_ends_nothing(tmp_path):
    (tmp_path / "profile").write_text("in the way")
    ((said,),) = run_distributed(profiled, 1, tmp_path, range(1, 4), 2, 2)
    assert "the trace of iterations 2 to 2 cannot be written" in said
