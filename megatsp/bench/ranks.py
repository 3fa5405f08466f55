"""Runs functions on several ranks of this machine.

Ranks are forked from a server that has imported torch once, so four start in well under a
second; the server itself touches no GPU and no process group. They meet in a file, not at a
port. `run_ranks` calls one function on processes that are new; `Ranks` are processes that wait
for calls until they are closed. A rank that has returned or failed lives on until the parent has
heard from all it needs, so that no rank fails because another one left; then all are killed, with
whatever they started. They also end themselves when the parent goes, however that one ends.
Ctrl-C is the parent's alone, and waits while ranks are started and killed.
"""

import multiprocessing
import os
import pickle
import signal
import sys
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
from queue import SimpleQueue
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
    """Calls fn(*args) once on ranks that are new, and returns what they return, in the order of ranks.

    See `Ranks` for what holds in a rank, and for the other arguments.

    Args:
        fn: a function at the top level of a module, which the ranks import.
        args: pickled, so that ranks share no memory with the parent or with each other.
        timeout_s: seconds after which all ranks are killed.

    Raises:
        RanksFailedError: a rank raised or died.
        TimeoutError: some ranks have not returned in time; their numbers are in the message.
    """
    call = pickle.dumps((fn, args))
    kind = Kind(world_size, device, join, quiet)
    # Longer than the parent waits: a hanging collective is the parent's to report.
    with interrupts_wait() as interrupts:
        ranks = Ranks(kind, group_timeout_s=timeout_s + 30, preload=preload)
        try:
            interrupts.let_in()
            return ranks.call_pickled(call, timeout_s)
        finally:
            interrupts.wait = True
            ranks.close()


@dataclass(frozen=True)
class Kind:
    """What ranks are.

    device: launch.device; it decides between gloo and NCCL. join: whether the default process group is
    initialised. quiet: whether what ranks print is kept for their failures, and not shown.
    """

    world_size: int
    device: str = "cpu"
    join: bool = True
    quiet: bool = False


class Ranks:
    """Processes of this machine that wait for calls, one process group over all of them.

    During a call the parent's environment, working directory, sys.path and warning filters hold in the
    ranks, and LOCAL_RANK is set. Each rank gets its share of the cores. After a call that failed, only
    `close` is left to do: other ranks may still be in it.

    Args:
        kind: how many, and what they are.
        group_timeout_s: timeout of the process group's collectives.
        preload: modules that the fork server imports; those of the first call in this process count.
    """

    def __init__(self, kind: Kind, group_timeout_s: float, preload: Sequence[str] = PRELOAD) -> None:
        self._kind = kind
        self._connections: list[Connection] = []
        self._processes: list[Any] = []
        self._folder = tempfile.TemporaryDirectory(prefix="megatsp-ranks-")
        try:
            _start_server(preload)
            context = multiprocessing.get_context("forkserver")
            for rank in range(kind.world_size):
                ours, theirs = context.Pipe()
                self._connections.append(ours)
                arguments = (rank, kind, theirs, self._folder.name, group_timeout_s)
                process = context.Process(target=_rank, args=arguments)
                process.start()
                self._processes.append(process)
                theirs.close()  # only the rank holds it, so its death is our end of file
        except BaseException:
            self.close()
            raise

    def call(self, fn: Callable[..., Any], *args: Any, timeout_s: float) -> list[Any]:
        """Calls fn(*args) on every rank; arguments, results and errors are those of `run_ranks`."""
        return self.call_pickled(pickle.dumps((fn, args)), timeout_s)

    def call_pickled(self, call: bytes, timeout_s: float) -> list[Any]:
        """The same for a pickled pair of function and arguments."""
        surroundings = _Surroundings(dict(os.environ), os.getcwd(), list(sys.path), list(warnings.filters))
        message = pickle.dumps((call, surroundings))
        for connection in self._connections:
            with suppress(BrokenPipeError):  # a rank that is dead is found so by whoever waits for it
                connection.send_bytes(message)
        return self._results(timeout_s)

    def close(self) -> None:
        """Kills the ranks, with whatever they started."""
        while self._processes:  # popped, so that nothing is left to destroy where an interrupt does not wait
            _kill(self._processes.pop())
        while self._connections:
            self._connections.pop().close()
        self._folder.cleanup()

    def _results(self, timeout_s: float) -> list[Any]:
        deadline, world_size = time.monotonic() + timeout_s, self._kind.world_size
        results: dict[int, Any] = {}
        failures: list[Failure] = []
        while waiting := [rank for rank in range(world_size) if rank not in results]:
            waited_for = [self._connections[rank] for rank in waiting]
            ready = wait(waited_for, max(0.0, deadline - time.monotonic()))
            if not ready and failures:
                break
            if not ready:
                raise TimeoutError(f"ranks {waiting} of {world_size} have not returned in {timeout_s:g} s")
            for rank in (rank for rank in waiting if self._connections[rank] in ready):
                report = self._report(rank)
                results[rank] = report.result
                if report.summary:
                    output = self._end_of_log(rank)
                    failures.append(Failure(rank, report.summary, report.traceback, output))
                    deadline = min(deadline, time.monotonic() + _GRACE_S)
        if failures:
            raise RanksFailedError(failures, world_size)
        return [results[rank] for rank in range(world_size)]

    def _report(self, rank: int) -> "_Report":
        try:
            return pickle.loads(self._connections[rank].recv_bytes())
        except (EOFError, ConnectionResetError):
            process = self._processes[rank]
            process.join()
            return _Report(summary=f"it died with exit code {process.exitcode}")

    def _end_of_log(self, rank: int) -> str:
        log = Path(self._folder.name, f"rank{rank}.log")
        return log.read_text(errors="replace")[-4000:] if self._kind.quiet else ""


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
def interrupts_wait() -> Iterator[_Interrupts]:
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
    """What a rank takes over from its parent for a call."""

    environment: dict[str, str]
    folder: str
    path: list[str]
    filters: list[Any]


@dataclass(frozen=True)
class _Report:
    """What a rank says after a call: its result, or the failure."""

    result: Any = None
    summary: str = ""
    traceback: str = ""


def _rank(rank: int, kind: Kind, parent: Connection, folder: str, group_timeout_s: float) -> None:
    """A rank's life: it joins, then answers call after call until it is killed."""
    os.setpgrp()
    calls: SimpleQueue[bytes] = SimpleQueue()
    threading.Thread(target=_listen, args=(parent, calls), daemon=True).start()
    _prefer_to_be_killed()
    if kind.quiet:
        log = os.open(Path(folder, f"rank{rank}.log"), os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
    has_joined = not kind.join
    while True:
        call, surroundings = pickle.loads(calls.get())
        os.environ.clear()
        os.environ.update(surroundings.environment, LOCAL_RANK=str(rank))
        os.chdir(surroundings.folder)
        sys.path[:] = surroundings.path
        warnings.simplefilter("error")  # also forgets which warnings were shown
        warnings.filters[:] = surroundings.filters  # type: ignore[index]  # typeshed hides that it is a list
        torch.set_num_threads(max(1, num_cores() // kind.world_size))
        try:
            if not has_joined:
                store = dist.FileStore(str(Path(folder, "store")), kind.world_size)
                device = choose_device(kind.device)
                join(device, group_timeout_s, store=store, rank=rank, world_size=kind.world_size)
                has_joined = True
            fn, args = pickle.loads(call)
            report = pickle.dumps(_Report(fn(*args)))
        except BaseException as error:
            summary = traceback.format_exception_only(error)[-1].strip()
            report = pickle.dumps(_Report(summary=summary, traceback=traceback.format_exc()))
        parent.send_bytes(report)


def _listen(parent: Connection, calls: "SimpleQueue[bytes]") -> None:
    """Hands on what the parent sends; kills this rank, and what it started, once the parent has gone."""
    with suppress(EOFError, OSError):
        while True:
            calls.put(parent.recv_bytes())
    os.killpg(0, signal.SIGKILL)


def _prefer_to_be_killed() -> None:
    """Where memory runs out, Linux kills a rank and not the parent, which has results to keep."""
    with suppress(OSError):  # another system, or a sandbox
        Path("/proc/self/oom_score_adj").write_text("1000")
