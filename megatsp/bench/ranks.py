"""Runs a function on several ranks of this machine, in processes that are new each time.

Ranks are forked from a server that has imported torch once, so four start in well under a
second; the server itself touches no GPU and no process group. They meet in a file, not at a
port. A rank that has returned or failed lives on until the parent has heard from all it needs,
so that no rank fails because another one left; then all are killed, with whatever they started.
They also end themselves when the parent goes, however that one ends. Ctrl-C is the parent's alone,
and waits while ranks are started and killed.
"""

import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatsp.axes import choose_device, join

PRELOAD = (
    "torch",
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
)
_GRACE_S = 0.1  # after a rank's exception: for news of the death of another, which may have caused it


@dataclass(frozen=True)
class Failure:
    """Why one rank returned nothing: in a line, and its traceback ("" of one that died).

    output: the end of what it printed, where that was not shown.
    """

    rank: int
    summary: str
    traceback: str = ""
    output: str = ""

    def __str__(self) -> str:
        return "\n".join(filter(None, (self.traceback or self.summary, self.output)))


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class RanksFailedError(RuntimeError):
    """Some ranks raised or died; those that died come first."""

    def __init__(self, failures: Sequence[Failure], world_size: int) -> None:
        self.failures = sorted(failures, key=lambda failure: bool(failure.traceback))
        texts = (f"rank {f.rank} of {world_size} failed:\n{f}" for f in self.failures)
        super().__init__("\n".join(texts))


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    device: str = "cpu",
    join: bool = True,
    quiet: bool = False,
    timeout_s: float = 120,
    preload: Sequence[str] = PRELOAD,
) -> list[Any]:
    """Calls fn(*args) on every rank and returns what they return, in the order of ranks.

    The parent's environment, working directory, sys.path and warning filters hold in the ranks, and
    LOCAL_RANK is set. Each rank gets its share of the cores.

    Args:
        fn: a function at the top level of a module, which the ranks import.
        world_size: number of ranks.
        args: pickled, so that ranks share no memory with the parent or with each other.
        device: launch.device; it decides between gloo and NCCL.
        join: whether the default process group is initialised.
        quiet: whether what ranks print is kept for their failures, and not shown.
        timeout_s: seconds after which all ranks are killed.
        preload: modules that the server imports; those of the first call in this process count.

    Raises:
        RanksFailedError: a rank raised or died.
        TimeoutError: some ranks have not returned in time; their numbers are in the message.
    """
    deadline = time.monotonic() + timeout_s
    call = pickle.dumps((fn, args))
    connections: list[Connection] = []
    processes: list[Any] = []
    with _interrupts() as interrupts, tempfile.TemporaryDirectory(prefix="megatsp-ranks-") as folder:
        store = str(Path(folder) / "store") if join else ""
        environment, filters = dict(os.environ), list(warnings.filters)
        surroundings = _Surroundings(environment, filters, world_size, store, device, folder if quiet else "")
        try:
            _start_server(preload)
            for rank in range(world_size):
                _start(processes, connections, call, rank, surroundings, timeout_s)
            interrupts.let_in()
            return _results(processes, connections, deadline, timeout_s, surroundings.log_folder)
        finally:
            interrupts.wait = True
            while processes:  # popped, so that nothing is left to destroy where an interrupt no longer waits
                _kill(processes.pop())
            while connections:
                connections.pop().close()


def _start(
    processes: list[Any],
    connections: list[Connection],
    call: bytes,
    rank: int,
    surroundings: "_Surroundings",
    timeout_s: float,
) -> None:
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    connections.append(ours)
    process = context.Process(target=_rank, args=(call, rank, theirs, surroundings, timeout_s))
    process.start()
    processes.append(process)
    theirs.close()  # only the rank holds it, so its death is our end of file


class _Interrupts:
    """Whether Ctrl-C has to wait, and the signals that do."""

    def __init__(self) -> None:
        self.wait = True
        self.held: list[int] = []

    def let_in(self) -> None:
        self.wait = False
        if self.held:
            signal.raise_signal(self.held.pop())


@contextmanager
def _interrupts() -> Iterator[_Interrupts]:
    """Inside, Ctrl-C, and SIGTERM where Python handles it, wait to the end or until `wait` is false.

    Python raises KeyboardInterrupt between any two instructions. In a destructor it is printed and
    dropped, and the caller goes on; between connecting to the fork server and writing to it, it
    ends the server; in the cleanup it leaves ranks and files.
    """
    interrupts = _Interrupts()
    handlers: dict[int, Any] = {}

    def handle(number: int, frame: Any) -> None:
        if interrupts.wait:
            interrupts.held.append(number)
        else:
            interrupts.wait = True  # a second one must not interrupt the cleanup after the first
            handlers[number](number, frame)
            interrupts.wait = False  # it has raised nothing

    if threading.current_thread() is threading.main_thread():  # no other thread is interrupted
        found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        handlers.update((number, handler) for number, handler in found.items() if callable(handler))
    try:
        for number in handlers:
            signal.signal(number, handle)
        yield interrupts
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if interrupts.held:
            signal.raise_signal(interrupts.held[0])


def _start_server(preload: Sequence[str]) -> None:
    """Starts the fork server, if it does not run, so that it and its ranks never see a SIGINT.

    A terminal sends one to them too; they would show a traceback while they import.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(preload))
    resource_tracker.ensure_running()  # before, for starting it unblocks SIGINT
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _results(
    processes: list[Any],
    connections: list[Connection],
    deadline: float,
    timeout_s: float,
    log_folder: str,
) -> list[Any]:
    results: dict[int, Any] = {}
    world_size = len(processes)
    failures: list[Failure] = []
    while waiting := [rank for rank in range(world_size) if rank not in results]:
        ready = wait([connections[rank] for rank in waiting], max(0.0, deadline - time.monotonic()))
        if not ready and failures:
            break
        if not ready:
            raise TimeoutError(f"ranks {waiting} of {world_size} have not returned in {timeout_s:g} s")
        for rank in (rank for rank in waiting if connections[rank] in ready):
            try:
                summary, trace, results[rank] = pickle.loads(connections[rank].recv_bytes())
            except (EOFError, ConnectionResetError):
                processes[rank].join()
                summary, trace = f"it died with exit code {processes[rank].exitcode}", ""
                results[rank] = None
            if summary:
                failures.append(Failure(rank, summary, trace, _end_of_log(log_folder, rank)))
                deadline = min(deadline, time.monotonic() + _GRACE_S)
    if failures:
        raise RanksFailedError(failures, world_size)
    return [results[rank] for rank in range(world_size)]


def _end_of_log(log_folder: str, rank: int) -> str:
    return Path(log_folder, f"rank{rank}.log").read_text(errors="replace")[-4000:] if log_folder else ""


def _kill(process: Any) -> None:
    """Ends a rank and the processes it started: it leads a process group of its own."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # it has gone, or has not come as far as setpgrp
        process.kill()
    process.join()
    process.close()


@dataclass(frozen=True)
class _Surroundings:
    """What a rank takes over from its parent, and where it meets the others."""

    environment: dict[str, str]
    filters: list[Any]
    world_size: int
    store: str  # the file to meet in; "" joins nothing
    device: str
    log_folder: str  # for what ranks print; "" shows it


def _rank(call: bytes, rank: int, parent: Connection, surroundings: _Surroundings, timeout_s: float) -> None:
    """A rank's life: join, call, report, wait to be killed."""
    os.setpgrp()
    watch = threading.Thread(target=_end_with, args=(parent,), daemon=True)
    watch.start()
    _prefer_to_be_killed()
    os.environ.clear()
    os.environ.update(surroundings.environment, LOCAL_RANK=str(rank))
    if surroundings.log_folder:
        log = os.open(Path(surroundings.log_folder, f"rank{rank}.log"), os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
    warnings.simplefilter("error")  # also forgets which warnings were shown
    warnings.filters[:] = surroundings.filters  # type: ignore[index]  # typeshed hides that it is a list
    try:
        world_size = surroundings.world_size
        torch.set_num_threads(max(1, num_cores() // world_size))
        if surroundings.store:
            # Longer than the parent waits: a hanging collective is the parent's to report.
            store = dist.FileStore(surroundings.store, world_size)
            device = choose_device(surroundings.device)
            join(device, timeout_s + 30, store=store, rank=rank, world_size=world_size)
        fn, args = pickle.loads(call)
        report = pickle.dumps(("", "", fn(*args)))
    except BaseException as error:
        summary = traceback.format_exception_only(error)[-1].strip()
        report = pickle.dumps((summary, traceback.format_exc(), None))
    parent.send_bytes(report)
    watch.join()


def _end_with(parent: Connection) -> None:
    """Kills this rank, and what it started, once the parent has gone: nothing else ends the poll."""
    parent.poll(None)
    os.killpg(0, signal.SIGKILL)


def _prefer_to_be_killed() -> None:
    """Where memory runs out, Linux kills a rank and not the parent, which has results to keep."""
    with suppress(OSError):  # another system, or a sandbox
        Path("/proc/self/oom_score_adj").write_text("1000")
