"""Runs a function on several gloo ranks of this machine, for tests.

Ranks are forked from a server that has imported torch once, so four start in well under a
second. They meet in a file, not at a port. A rank that has returned or failed lives on until
the parent has heard from all it needs, so that no rank fails because another one left; then
all are killed, with whatever they started.
"""

import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "torch",
        "torch._dynamo",
        "torch._inductor",
        "torch.distributed.checkpoint.state_dict",
        "torch.distributed.fsdp",
        "torch.distributed.tensor",
        "pytest",
    ]
)


def run_distributed(fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120) -> list[Any]:
    """Calls fn(*args) on every rank, the default process group initialised, and returns their results.

    The parent's environment, working directory, sys.path and warning filters (so: warnings
    are errors) hold in the ranks. Each rank gets its share of the cores.

    Args:
        fn: a function at the top level of a module, which the ranks import.
        world_size: number of ranks.
        args: pickled, so that ranks share no memory with the parent or with each other.
        timeout_s: seconds after which all ranks are killed.

    Returns: what fn returned, pickled, in the order of ranks.

    Raises:
        AssertionError: a rank raised or died; its number and traceback are in the message.
        TimeoutError: some ranks have not returned in time; their numbers are in the message.
    """
    deadline = time.monotonic() + timeout_s
    call = pickle.dumps((fn, args))
    connections: list[Connection] = []
    processes: list[Any] = []
    results: dict[int, Any] = {}
    with tempfile.TemporaryDirectory(prefix="megatsp-ranks-") as folder:
        try:
            surroundings = (dict(os.environ), list(warnings.filters), timeout_s)
            for rank in range(world_size):
                ours, theirs = _context.Pipe()
                connections.append(ours)
                process = _context.Process(
                    target=_rank, args=(call, rank, world_size, folder, theirs, surroundings)
                )
                process.start()
                processes.append(process)
                theirs.close()  # only the rank holds it, so its death is our end of file
            while waiting := [rank for rank in range(world_size) if rank not in results]:
                left_s = max(0.0, deadline - time.monotonic())
                ready = wait([connections[rank] for rank in waiting], left_s)
                if not ready:
                    raise TimeoutError(f"ranks {waiting} of {world_size} have not returned in {timeout_s} s")
                failures = []
                for rank in (rank for rank in waiting if connections[rank] in ready):
                    try:
                        failure, results[rank] = pickle.loads(connections[rank].recv_bytes())
                    except EOFError:
                        processes[rank].join()
                        failure = f"it died with exit code {processes[rank].exitcode}"
                    if failure:
                        failures.append(f"rank {rank} of {world_size} failed:\n{failure}")
                if failures:
                    raise AssertionError("\n".join(failures))
        finally:
            for process in processes:
                _kill(process)
            for connection in connections:
                connection.close()
    return [results[rank] for rank in range(world_size)]


def _kill(process: Any) -> None:
    """Ends a rank and the processes it started: it leads a process group of its own."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # it has gone, or has not come as far as setpgrp
        process.kill()
    process.join()
    process.close()


def _rank(
    call: bytes, rank: int, world_size: int, folder: str, parent: Connection, surroundings: tuple[Any, ...]
) -> None:
    """A rank's life: join, call, report, wait to be killed."""
    os.setpgrp()
    environment, filters, timeout_s = surroundings
    os.environ.clear()
    os.environ.update(environment)
    warnings.simplefilter("error")  # also forgets which warnings were shown
    warnings.filters[:] = filters  # type: ignore[index]  # typeshed hides that it is a list
    try:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world_size))
        # Longer than the parent waits: a hanging collective is the parent's to report.
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(str(Path(folder) / "store"), world_size),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s + 30),
        )
        fn, args = pickle.loads(call)
        report = pickle.dumps(("", fn(*args)))
    except BaseException:
        report = pickle.dumps((traceback.format_exc(), None))
    parent.send_bytes(report)
    parent.poll(None)  # returns only if the parent has gone
