"""What the start of a run takes from its profile and its launcher, by the command line."""

import os
import sys
import types
from pathlib import Path

import pytest
import torch

from megatsp import cli, launcher
from megatsp.cluster import start
from megatsp.schema import Config, LaunchConfig

OURS = """\
about: ours
variables:
  MEGATSP_TEST_A: {value: '1', why: x}
  MEGATSP_TEST_B: {value: '2', why: x}
"""
RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_STEP_ID", launcher.LAUNCHER_PID)
NAMES = ("MEGATSP_TEST_A", "MEGATSP_TEST_B", "OMP_NUM_THREADS")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher's variable is set, nor a profile's; what a test sets goes away with it."""
    for name in (*RANK, *NAMES):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Who would have trained: "launcher" or "rank"; neither does."""
    seen: list[str] = []
    fake = types.ModuleType("megatsp.training.run")
    fake.train = lambda *_: seen.append("rank") or 0  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    monkeypatch.setattr(launcher, "launch_local", lambda *_: seen.append("launcher") or 0)
    monkeypatch.setattr(launcher, "run_rank", lambda work: sys.exit(work()))
    return seen


def run(*arguments: str) -> int:
    """`megatsp train`'s exit status."""
    try:
        return cli.main(["train", *arguments])
    except SystemExit as ended:  # of a rank
        assert isinstance(ended.code, int)
        return ended.code


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, world_size: int, **more: str) -> None:
    for name, value in {"RANK": f"{rank}", "WORLD_SIZE": f"{world_size}", **more}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def profile(tmp_path: Path) -> str:
    (tmp_path / "ours.yaml").write_text(OURS)
    return f"launch.profile={tmp_path / 'ours.yaml'}"


def test_the_launcher_applies_a_profile_and_says_whose_values_hold(
    started: list[str], profile: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MEGATSP_TEST_B", "9")

    assert run(profile) == 0

    assert started == ["launcher"]
    assert (os.environ["MEGATSP_TEST_A"], os.environ["MEGATSP_TEST_B"]) == ("1", "9")
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("environment: MEGATSP_TEST_A=1 (profile /")
    assert second.startswith("environment: MEGATSP_TEST_B=9 (your own; profile /")


def test_ranks_of_that_launcher_do_not_say_it_again(
    started: list[str], profile: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    as_rank(monkeypatch, 0, 1, **{launcher.LAUNCHER_PID: "1", "MEGATSP_TEST_A": "1", "MEGATSP_TEST_B": "2"})

    assert run(profile) == 0

    assert started == ["rank"]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_of_another_launcher_apply_it_themselves_and_the_first_says_it(
    rank: int, started: list[str], profile: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    as_rank(monkeypatch, rank, 2, LOCAL_WORLD_SIZE="2")

    assert run(profile) == 0

    assert started == ["rank"] and os.environ["MEGATSP_TEST_A"] == "1"
    assert len(capsys.readouterr().out.splitlines()) == (2 if rank == 0 else 0)


def test_a_run_without_a_profile_says_nothing(started: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    assert capsys.readouterr().out == "" and started == ["launcher"]


def test_threads_hold_in_a_rank_that_has_loaded_torch() -> None:
    before, config = torch.get_num_threads(), Config(launch=LaunchConfig(profile="cpu"))
    try:
        torch.set_num_threads(2)
        assert start.enter(config, {"OMP_NUM_THREADS": "2"}) == [
            "environment: OMP_NUM_THREADS=2 (your own; profile cpu has 1)"
        ]
        assert torch.get_num_threads() == 2
        assert start.enter(config, {}) == ["environment: OMP_NUM_THREADS=1 (profile cpu)"]
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["launch.profile=mi300"], "launch.profile: unknown profile mi300; did you mean mi300x_roce?"),
        (["launch.profile=./absent.yaml"], "no profile absent.yaml; shipped ones: none, cpu"),
        (["launch.profile=./absent.yaml", "--dry-run"], "no profile absent.yaml"),
        (["launch.nodes=2"], "launch.nodes=2: megatsp train and sft start ranks on this machine alone; use"),
        (["--show-mesh=mesh.jpg"], "--show-mesh=mesh.jpg: give a file that ends with .png"),
    ],
)
def test_bad_input(
    arguments: list[str], message: str, started: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err
    assert not started


def test_a_launcher_starts_as_many_ranks_as_the_nodes_have(
    started: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    as_rank(monkeypatch, 0, 6, LOCAL_WORLD_SIZE="3")

    assert run("launch.nodes=2", "launch.nproc=4") == 2
    message = "launch.nodes=2 x launch.nproc=4 = 8 ranks, but the launcher started WORLD_SIZE=6; start 8"
    assert message in capsys.readouterr().err
    assert run("launch.nodes=2", "launch.nproc=3", "parallel.tsp=2", "trainer.global_batch_size=12") == 0
    assert run("launch.nproc=4", "parallel.tsp=2", "trainer.global_batch_size=12") == 0  # of one node: any


def test_tsp_over_nodes_is_warned_of_where_the_launcher_says_how_many_a_node_has(
    started: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    as_rank(monkeypatch, 0, 4, LOCAL_WORLD_SIZE="2")
    assert run("parallel.tsp=4") == 0
    assert "warning: parallel.tsp=4: a group must lie inside a node" in capsys.readouterr().out

    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert run("parallel.tsp=4") == 0
    assert capsys.readouterr().out == ""


def test_show_mesh_describes_all_nodes_and_starts_nothing(
    started: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nodes = ["launch.nodes=2", "launch.nproc=4", "trainer.global_batch_size=32"]

    assert run("--show-mesh", "parallel.tsp=2", *nodes) == 0
    assert "8 ranks on 2 nodes of 4: dp_shard 4 x tsp 2" in capsys.readouterr().out

    assert run(f"--show-mesh={tmp_path}/mesh.png", "parallel.tsp=8", *nodes) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"{tmp_path}/mesh.png" and (tmp_path / "mesh.png").stat().st_size > 1000
    assert any(line.startswith("warning: parallel.tsp=8") for line in lines)

    assert run("--dry-run", "--show-mesh", "parallel.tsp=2", "launch.profile=ethernet", *nodes) == 0
    text = capsys.readouterr().out
    assert "environment: NCCL_IB_DISABLE=1 (profile ethernet)" in text and "NCCL_IB_DISABLE" not in os.environ
    assert "world            8 ranks" in text and "2 nodes of 4" in text
    assert not started
