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

import pytest
import torch
import torch.distributed as dist
from distributed import run_distributed
from waiting import LIMIT_S, hang, wait_until, wait_until_gone

from megatsp.bench import ranks

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


def noted(folder: Path) -> list[int]:
    return [int(note.name) for note in folder.iterdir()]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_results_come_in_rank_order(world_size: int) -> None:
    ones = torch.ones(3)
    results = run_distributed(sum_of_ranks, world_size, 0.5, ones)
    total = world_size + world_size * (world_size - 1) / 2
    assert [rank for _, rank, _ in results] == list(range(world_size))
    for _, _, tensor in results:
        torch.testing.assert_close(tensor, torch.full((3,), 0.5 * total))
    assert torch.equal(ones, torch.ones(3))
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
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert run_distributed(surroundings, 2) == [("seen", str(tmp_path), threads)] * 2


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
    run_distributed(surroundings, 1)
    server = forkserver._forkserver._forkserver_pid
    original, calls = getattr(owner, name), []

    def interrupted(*args: Any) -> Any:
        calls.append(name)
        if len(calls) == 1:
            signal.raise_signal(signal.SIGINT)
        return original(*args)

    monkeypatch.setattr(owner, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_distributed(note_pid, 2, str(tmp_path))
    assert len(calls) > 1 and not multiprocessing.active_children()  # it went on to the end
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    wait_until_gone(*noted(tmp_path))
    run_distributed(surroundings, 1)
    assert forkserver._forkserver._forkserver_pid == server


def hang_for_ever(pids: str) -> None:
    note_pid(pids)
    hang()


def test_an_interrupt_ends_the_wait_for_ranks(interruptible: None, tmp_path: Path) -> None:
    def interrupt() -> None:
        wait_until(lambda: len(noted(tmp_path)) == 2, "both ranks hang")
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        run_distributed(hang_for_ever, 2, str(tmp_path), timeout_s=FOR_EVER_S)
    thread.join()
    assert not multiprocessing.active_children()


def signal_mask() -> set[int]:
    return signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_ranks_are_spared_the_terminals_interrupt() -> None:
    assert signal.SIGINT not in signal_mask()
    assert all(signal.SIGINT in mask for mask in run_distributed(signal_mask, 2))
