"""Ranks on this machine, attempt after attempt."""

import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from megatsp.exit_status import INTERRUPTED, REQUEUE, USER_ERROR
from megatsp.launcher.failures import failures, show, signal_name
from megatsp.launcher.fork import ForkedRanks
from megatsp.launcher.outcome import ATTEMPT_FOLDER, write_outcome
from megatsp.launcher.rank import LAUNCHER_PID
from megatsp.launcher.restarts import Count, Restarts
from megatsp.launcher.signals import PASSED_ON, Signals, Stopped, restored

if TYPE_CHECKING:
    from megatsp.launcher.agent import Nodes


class _Ranks(Protocol):
    """The ranks of one attempt on this machine; ended: those that were killed here."""

    ended: set[int]

    def run_ranks(self) -> dict[int, int]: ...

    def kill(self) -> None: ...

    def close(self) -> None: ...


@dataclass
class _Running:
    """The ranks of the attempt that runs, if one does."""

    ranks: list[_Ranks] = field(default_factory=list)

    def kill(self) -> None:
        for ranks in self.ranks:
            ranks.kill()


def launch_local(
    nproc: int, command: list[str], restarts: Restarts | None = None, nodes: "Nodes | None" = None
) -> int:
    """Runs `command` as `nproc` ranks on this machine, with torchrun's environment variables.

    Alone, `command` is started once and calls `become_rank`; on several nodes, once a rank.

    Must be called in the main thread, which it needs for signals.

    Args:
        restarts: of ranks that resume by themselves; None: one attempt, and what SIGTERM or SIGUSR1 ends is
            lost.
        nodes: the other machines of a job, on which the same is called; None: there are none.

    Returns:
        The exit status: 0 if every rank exited 0; otherwise the cause is on stderr. REQUEUE (75) asks for the
        same command again: ranks that resume were told to stop by SIGTERM, SIGUSR1 or their own limit.
    """
    running, attempt = _Running(), 0
    count = Count(restarts) if restarts else None
    with restored(), _environment(_rank_environment(nproc)):
        signals = Signals(PASSED_ON if restarts else (signal.SIGINT,), running.kill)
        try:
            while True:
                status, pause_s = _attempt(nproc, command, signals, running, count, attempt, nodes)
                if pause_s is None:
                    return status
                signals.wait(pause_s)
                attempt += 1
        except Stopped:  # no rank ran, so there is nothing to save
            return _stopped(signals, bool(restarts) and not signals.is_hard)


def _attempt(
    nproc: int,
    command: list[str],
    signals: Signals,
    running: _Running,
    count: Count | None,
    attempt: int,
    nodes: "Nodes | None",
) -> tuple[int, float | None]:
    """Runs the ranks once: the exit status, and how long to wait before they start again, or None."""
    with tempfile.TemporaryDirectory(prefix="megatsp_") as name:
        folder = Path(name)
        ranks: _Ranks
        if nodes is None:
            ranks = ForkedRanks(nproc, command, folder, signals, attempt)
        else:
            from megatsp.launcher.agent import Agent  # which imports torch

            ranks = Agent(nproc, command, folder, signals, nodes)
        running.ranks = [ranks]
        try:
            codes = ranks.run_ranks()
        finally:
            running.ranks = []
            ranks.close()
        if not codes:
            return 0, None
        first = nodes.index * nproc if nodes else 0
        killed_here = {rank for rank in ranks.ended if codes.get(rank) == -signal.SIGKILL}
        own = {rank: code for rank, code in codes.items() if rank not in killed_here}
        found = failures(own, folder, first)
    if attempt_folder := os.environ.get(ATTEMPT_FOLDER):
        for failure in found:
            write_outcome(Path(attempt_folder), failure)
    if signals.is_hard:
        return _stopped(signals, False), None
    if signals.first == signal.SIGINT and {INTERRUPTED, -signal.SIGINT} & {*codes.values()}:
        return INTERRUPTED, None
    if REQUEUE in codes.values():
        return REQUEUE, None
    if signals.first and -signals.first in codes.values():  # it came before they listened, or they never do
        return _stopped(signals, count is not None), None
    if not attempt_folder:  # a job shows the cause among all its nodes
        show(found)
    cause = found[0]
    if count is None or cause.status == USER_ERROR:
        return cause.status, None
    if signals.first:  # they were to end: they do not start again here
        requeue = cause.may_pass and signals.first != signal.SIGINT
        return REQUEUE if requeue else cause.status, None
    return cause.status, count.pause_s(cause)


def _stopped(signals: Signals, resumes: bool) -> int:
    """The exit status after ranks did not end in good order, because of a signal."""
    number = signals.heard[-1]
    if number == signal.SIGINT:
        return INTERRUPTED
    if resumes:
        return REQUEUE
    print(f"megatsp: error: stopped by {signal_name(number)}", file=sys.stderr)
    return 128 + number


def _rank_environment(nproc: int) -> dict[str, str]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // nproc))),
        "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGHUP,SIGQUIT",  # the others are ours
        LAUNCHER_PID: str(os.getpid()),
    }


@contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    """These environment variables inside the block; ranks inherit them."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
