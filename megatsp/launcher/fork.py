"""Local ranks, forked from one process that has imported what they need.

The launcher, which imports no torch itself, starts that process by the ranks' own command: the server. It
imports, forks the ranks of one attempt and tells how each ends. It touches no device, opens no process group
and starts no thread, which would be of no use in a rank. The kernel kills it when the launcher dies, and the
ranks when it dies. Ranks meet in a file: no port is opened for that, and no name is looked up.
"""

import ctypes
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from megatsp.exit_status import FAILURE, HANG, REQUEUE
from megatsp.launcher.rank import LAUNCHER_PID, SERVER_PID, die_with
from megatsp.launcher.signals import PASSED_ON, Signals

SERVER = "MEGATSP_SERVER"  # in the server's environment: the descriptor by which it tells its launcher
STORE = "MEGATSP_STORE"  # in a rank's: the file in which the ranks of an attempt meet
# How long the other ranks may go on after one ended with this status: all end in good order then, or write
# their stacks. After any other they wait for it in vain.
GRACE_S = {REQUEUE: 30.0, HANG: 3.0}
REAPED_S = 5.0  # until the kernel has taken a killed process away
_PR_SET_NAME = 15


class ForkedRanks:
    """The `nproc` ranks of one attempt; their error files and their meeting place are under `folder`.

    command: starts the server, which calls `become_rank`. attempt: 0 for the first one; the ranks'
    TORCHELASTIC_RESTART_COUNT, as under torchrun. ended: the ranks that were killed here, after another one
    had failed.
    """

    def __init__(self, nproc: int, command: list[str], folder: Path, signals: Signals, attempt: int) -> None:
        self.ended: set[int] = set()
        self._nproc, self._folder, self._signals = nproc, folder, signals
        self._pids: dict[int, int] = {}
        self._codes: dict[int, int] = {}
        self._heard = b""  # of a line that is not complete
        for rank in range(nproc):
            (folder / str(rank)).mkdir()
        variables = {
            "WORLD_SIZE": str(nproc), "LOCAL_WORLD_SIZE": str(nproc), STORE: str(folder / "store"),
            "TORCHELASTIC_RESTART_COUNT": str(attempt),
        }  # fmt: skip
        self._channel, theirs = socket.socketpair()
        with theirs:
            variables[SERVER] = str(theirs.fileno())
            self._server = subprocess.Popen(
                command, env=os.environ | variables, pass_fds=[theirs.fileno()], start_new_session=True
            )

    def run_ranks(self) -> dict[int, int]:
        """Waits until all ranks have ended; returns the exit codes of those that failed, by number.

        Raises:
            Stopped: a signal came before any rank ran.
        """
        while not self._pids and not self._codes:
            self._signals.wait(0)
            self._listen(0.1)
        self._signals.started(list(self._pids.values()))
        done: set[int] = set()
        while len(self._codes) < self._nproc:
            self._listen(0.1)
            for rank in [rank for rank, code in self._codes.items() if code == 0 and rank not in done]:
                done.add(rank)
                self._signals.pids.remove(self._pids[rank])
                _kill_group(self._pids[rank])  # what it left
            if failed := [code for code in self._codes.values() if code]:
                end = time.monotonic() + max(GRACE_S.get(code, 0.0) for code in failed)
                while len(self._codes) < self._nproc and time.monotonic() < end and not self._signals.is_hard:
                    self._listen(0.05)
                self._kill_and_reap()
        self._kill_and_reap()
        return {rank: code for rank, code in self._codes.items() if code}

    def kill(self) -> None:
        """Kills every rank with whatever it started, also where the rank itself has failed."""
        if not self._pids:
            self._server.kill()
        for rank, pid in self._pids.items():
            if self._codes.get(rank) == 0:  # its number may be another process's by now
                continue
            if rank not in self._codes:
                self.ended.add(rank)
            _kill_group(pid)

    def close(self) -> None:
        """Ends what still runs, the server with it."""
        self.kill()
        self._signals.pids = []
        self._server.kill()
        self._server.wait()
        self._channel.close()

    def _listen(self, seconds: float) -> None:
        """Notes what the server tells within so long: the ranks' process ids, then how each one ended."""
        if not select.select([self._channel], [], [], seconds)[0]:
            return
        content = self._channel.recv(1 << 16)
        *lines, self._heard = (self._heard + content).split(b"\n")
        for told in map(json.loads, lines):
            if not self._pids:
                self._pids = dict(enumerate(told))
            else:
                self._codes[told[0]] = told[1]
        if not content:  # the server has gone, and every rank with it
            status = self._server.wait() or FAILURE
            self._codes = {rank: self._codes.get(rank, status) for rank in range(self._nproc)}

    def _kill_and_reap(self) -> None:
        self.kill()
        end = time.monotonic() + REAPED_S
        while time.monotonic() < end and len(self._codes) < self._nproc:
            self._listen(0.01)
        for pid in self._pids.values():
            while time.monotonic() < end and group_runs(pid):
                time.sleep(0.01)
        drop_torn(self._folder)


def become_rank(modules: Sequence[str]) -> None:
    """In a server: imports modules, forks, and returns in each rank, whose variables are then set.

    Returns at once in any other process.
    """
    if SERVER not in os.environ:
        return
    for number in PASSED_ON:  # a scheduler may send them to every process of a job: they are the ranks'
        signal.signal(number, signal.SIG_IGN)
    die_with(int(os.environ[LAUNCHER_PID]))
    for name in modules:
        importlib.import_module(name)
    gc.freeze()  # so that no collection in a rank touches, and copies, what all share
    server, folder = os.getpid(), Path(os.environ[STORE]).parent
    with socket.socket(fileno=int(os.environ.pop(SERVER))) as channel:
        # Blocked until a rank would hear them: what is ignored meanwhile would be lost.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
        ranks: dict[int, int] = {}
        for rank in range(int(os.environ["WORLD_SIZE"])):
            pid = os.fork()
            if not pid:
                channel.close()
                _enter(rank, server, folder)
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
                return
            ranks[pid] = rank
        _tell(channel, [*ranks])
        while ranks:
            pid, status = os.wait()
            if pid in ranks:
                _tell(channel, [ranks.pop(pid), os.waitstatus_to_exitcode(status)])
    os._exit(0)


def _enter(rank: int, server: int, folder: Path) -> None:
    """What makes a fork of the server a rank: a session, signals and variables of its own."""
    os.setsid()
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), SERVER_PID: str(server),
        "TORCHELASTIC_ERROR_FILE": str(folder / str(rank) / "error.json"),
    }  # fmt: skip
    die_with(server)
    if sys.platform == "linux":  # ps and top tell ranks apart by it: their command lines are the server's
        ctypes.CDLL(None).prctl(_PR_SET_NAME, f"rank {rank}".encode())
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in PASSED_ON:
        if number != signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)


def _tell(channel: socket.socket, what: list[int]) -> None:
    channel.sendall(json.dumps(what).encode() + b"\n")


def _kill_group(pid: int) -> None:
    """Kills a rank and what it started; the rank alone, if it has not come as far as a group of its own."""
    for kill in (os.killpg, os.kill):
        with suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)
            return


def group_runs(group: int) -> bool:
    """Whether a process of this group runs: what a rank started may outlive it, with the run's lock."""
    for process in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError):
            state, _, process_group = process.read_text().rpartition(")")[2].split()[:3]
            if int(process_group) == group and state not in "ZX":
                return True
    return False


def drop_torn(folder: Path) -> None:
    """Removes the error files of ranks that were killed while they wrote them."""
    for file in folder.rglob("error.json"):
        try:
            json.loads(file.read_text())
        except ValueError:
            file.unlink()
