"""The helper that starts ranks for every other test: results, failures, timeouts, nothing left behind."""

import multiprocessing
import os
import pickle
import signal
import subprocess
import threading
import warnings
from multiprocessing import connection, forkserver, reduction
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import distributed
import pytest
import torch
import torch.distributed as dist
from distributed import run_distributed
from waiting import LIMIT_S, hang, wait_until, wait_until_gone

from megatsp.axes import Axes
from megatsp.bench import ranks
from megatsp.schema import AXES, ParallelConfig

FOR_EVER_S = 3600.0  # pytest's limit of a test strikes before


def sum_of_ranks(scale: float, tensor: torch.Tensor) -> tuple[int, int, torch.Tensor]:
    tensor += dist.get_rank()  # the rank's own copy
    dist.all_reduce(tensor)
    return os.getpid(), dist.get_rank(), scale * tensor


def fail_on_one(bad_rank: int, pids: str) -> None:
    note_pid(pids)
    dist.barrier()
    if dist.get_rank() == bad_rank:
        raise ValueError("the planted error")
    dist.barrier()  # the failing rank never comes


def die_on_one(bad_rank: int) -> None:
    if dist.get_rank() == bad_rank:
        os._exit(7)
    dist.barrier()


def hang_with_a_child(pids: str) -> None:
    note_pid(pids)
    child = subprocess.Popen(["sleep", "infinity"])
    note_pid(pids, child.pid)
    if dist.get_rank() == 0:
        hang()


def surroundings() -> tuple[str | None, str, int]:
    return os.environ.get("MEGATSP_TEST_MARK"), os.getcwd(), torch.get_num_threads()


def warn() -> None:
    warnings.warn("the planted warning", stacklevel=1)


def note_pid(folder: str, pid: int | None = None) -> None:
    Path(folder, str(pid or os.getpid())).touch()


def active_children() -> set[int]:
    return {process.pid for process in multiprocessing.active_children()}


def noted(folder: Path) -> list[int]:
    return [int(note.name) for note in folder.iterdir()]


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_results_come_in_rank_order(world_size: int, fresh: bool) -> None:
    ones = torch.ones(3)
    results = run_distributed(sum_of_ranks, world_size, 0.5, ones, fresh=fresh)
    total = world_size + world_size * (world_size - 1) / 2
    assert [rank for _, rank, _ in results] == list(range(world_size))
    for _, _, tensor in results:
        torch.testing.assert_close(tensor, torch.full((3,), 0.5 * total))
    assert torch.equal(ones, torch.ones(3))
    if fresh:
        wait_until_gone(*[pid for pid, _, _ in results])


def test_first_failure_is_raised_at_once(tmp_path: Path) -> None:
    """The others wait for ever, and the parent for longer than a test may take."""
    with pytest.raises(AssertionError, match=r"rank 2 of 3 failed") as error:
        run_distributed(fail_on_one, 3, 2, str(tmp_path), timeout_s=FOR_EVER_S)
    message = str(error.value)
    assert "ValueError: the planted error" in message and "in fail_on_one" in message
    assert "rank 0" not in message and "rank 1" not in message
    assert len(noted(tmp_path)) == 3
    wait_until_gone(*noted(tmp_path))


def test_a_death_is_reported() -> None:
    with pytest.raises(AssertionError, match=r"rank 1 of 2 failed:\nit died with exit code 7"):
        run_distributed(die_on_one, 2, 1)


def test_timeout_kills_ranks_and_their_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time is up once rank 1 has returned and both have started a child."""
    given: list[float] = []

    def wait(connections: list[Connection], timeout_s: float) -> list[Any]:
        given.append(timeout_s)
        wait_until(
            lambda: connection.wait(connections, 0) or (len(connections) == 1 and len(noted(tmp_path)) == 4),
            "what the ranks do",
        )
        return connection.wait(connections, 0)

    monkeypatch.setattr(ranks, "wait", wait)
    with pytest.raises(TimeoutError, match=r"ranks \[0\] of 2 have not returned in 3600 s"):
        run_distributed(hang_with_a_child, 2, str(tmp_path), timeout_s=FOR_EVER_S)
    assert len(given) > 1 and all(FOR_EVER_S - LIMIT_S < seconds < FOR_EVER_S for seconds in given)
    pids = noted(tmp_path)
    assert len(pids) == 4
    wait_until_gone(*pids)


def test_ranks_share_the_parents_surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGATSP_TEST_MARK", "seen")
    monkeypatch.chdir(tmp_path)
    assert run_distributed(surroundings, 2) == [("seen", str(tmp_path), 1)] * 2
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert run_distributed(surroundings, 2, fresh=True) == [("seen", str(tmp_path), threads)] * 2


def test_warnings_are_errors_in_ranks() -> None:
    with pytest.raises(AssertionError, match="UserWarning: the planted warning"):
        run_distributed(warn, 1)


def test_a_local_function_is_refused() -> None:
    with pytest.raises((AttributeError, pickle.PicklingError)):
        run_distributed(lambda: None, 1)


# Where a rank is being started, where a destructor runs, which drops exceptions, and in the cleanup.
@pytest.mark.parametrize(
    ("owner", "name"), [(reduction, "sendfds"), (Connection, "__del__"), (ranks, "_kill")]
)
def test_an_interrupt_waits_where_it_would_do_harm(
    interruptible: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    run_distributed(surroundings, 1, fresh=True)
    server = forkserver._forkserver._forkserver_pid
    original, calls, pooled = getattr(owner, name), [], active_children()

    def interrupted(*args: Any) -> Any:
        calls.append(name)
        if len(calls) == 1:
            signal.raise_signal(signal.SIGINT)
        return original(*args)

    monkeypatch.setattr(owner, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_distributed(note_pid, 2, str(tmp_path), fresh=True)
    assert len(calls) > 1 and active_children() == pooled  # it went on to the end
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    wait_until_gone(*noted(tmp_path))
    run_distributed(surroundings, 1, fresh=True)
    assert forkserver._forkserver._forkserver_pid == server


def hang_for_ever(pids: str) -> None:
    note_pid(pids)
    hang()


@pytest.mark.parametrize("fresh", [False, True])
def test_an_interrupt_ends_the_wait_for_ranks(interruptible: None, tmp_path: Path, fresh: bool) -> None:
    def interrupt() -> None:
        wait_until(lambda: len(noted(tmp_path)) == 2, "both ranks hang")
        os.kill(os.getpid(), signal.SIGINT)

    distributed.close_pools()
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        run_distributed(hang_for_ever, 2, str(tmp_path), timeout_s=FOR_EVER_S, fresh=fresh)
    thread.join()
    assert not multiprocessing.active_children()


def signal_mask() -> set[int]:
    return signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_ranks_are_spared_the_terminals_interrupt() -> None:
    assert signal.SIGINT not in signal_mask()
    assert all(signal.SIGINT in mask for mask in run_distributed(signal_mask, 2))


def leave(what: str) -> int:
    """On a rank: leaves nothing, or something that a later call must not find."""
    if what == "a patch":
        ranks.num_cores = lambda: 3  # type: ignore[assignment]
    elif what == "a thread":
        threading.Thread(target=hang, daemon=True).start()
    elif what == "a child":
        subprocess.Popen(["sleep", "600"])
    elif what == "a handler":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    elif what == "a dtype":
        torch.set_default_dtype(torch.float64)
    elif what == "no group":
        dist.destroy_process_group()
    elif what == "a group":
        dist.new_group([0, 1])
    elif what == "a seed":
        torch.manual_seed(3)
    return os.getpid()


@pytest.mark.parametrize(
    "what", ["a patch", "a thread", "a child", "a handler", "a dtype", "no group", "an error"]
)
def test_ranks_that_a_call_changed_are_replaced(what: str) -> None:
    before = run_distributed(leave, 2, "")
    assert run_distributed(leave, 2, "nothing") == before
    if what == "an error":
        with pytest.raises(AssertionError):
            run_distributed(fail_on_one, 2, 1, "/nowhere")
    else:
        assert run_distributed(leave, 2, what) == before
    assert not set(run_distributed(leave, 2, "")) & set(before)
    wait_until_gone(*before)


def observe() -> tuple[int, float]:
    """On a rank: how many process groups there are, and a random number."""
    return len(dist.distributed_c10d._world.pg_map), torch.rand(()).item()


def test_groups_and_seeds_of_one_call_are_not_found_by_the_next() -> None:
    before = run_distributed(observe, 2)
    for what in ("a group", "a seed"):
        run_distributed(leave, 2, what)
        assert run_distributed(observe, 2) == before


def mesh_groups(parallel: ParallelConfig) -> tuple[int, list[str]]:
    axes = Axes.build(parallel, torch.device("cpu"))
    names = [axes.mesh.get_group(name).group_name for name in AXES] + [axes.sequence.group.group_name]
    total = torch.ones(())
    axes.sequence.all_reduce(total, "test").wait()
    assert total.item() == axes.sequence.size and list(axes.traffic.elements) == ["test"]
    return os.getpid(), names


def test_a_mesh_has_its_groups_once() -> None:
    whole, folded = (ParallelConfig(dp_shard=1, cp=cp, tsp=4 // cp) for cp in (1, 2))
    first = run_distributed(mesh_groups, 4, folded)
    assert run_distributed(mesh_groups, 4, whole) != first
    assert run_distributed(mesh_groups, 4, folded) == first


def test_pools_use_a_bounded_number_of_ranks() -> None:
    for world_size in (8, 4, 3, 2):
        run_distributed(leave, world_size, "")
        assert sum(distributed._pools) <= distributed._MOST_RANKS
    assert list(distributed._pools) == [4, 3, 2]
