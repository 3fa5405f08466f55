"""Local ranks: started and watched by torch's elastic agent, and what a rank owes its launcher.

Every rank is an ordinary process in a session of its own, so Ctrl-C on the terminal reaches the
launcher alone. The launcher passes the first one on as a request to finish the step, save and exit
0, and keeps watching; the second kills. A rank that dies takes the job down, and the launcher shows
that rank's error alone. A rank dies with its launcher, however that one ends.
"""

import ctypes
import json
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from torch.distributed.elastic.agent.server.api import RunResult
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

LAUNCHER_PID = "MEGATSP_LAUNCHER_PID"  # in a rank's environment: the process that started it
USER_ERROR = 2  # exit status after a mistake of the user's: its message is all there is to show
INTERRUPTED = 130  # exit status after Ctrl-C
_PR_SET_PDEATHSIG = 1


def launch_local(nproc: int, command: list[str]) -> int:
    """Runs `command` as `nproc` ranks on this machine, with torchrun's environment variables.

    Must be called in the main thread, which it needs for signals.

    Returns:
        The exit status: 0 if every rank exited 0; otherwise the cause is on stderr.
    """
    from torch.distributed.elastic.multiprocessing import SignalException

    with tempfile.TemporaryDirectory(prefix="megatsp_") as folder, _signals_restored():
        with _environment(_rank_environment(nproc)), _elastic_is_quiet():
            agent = _agent(nproc, command, folder)
            interrupts = _pass_on_interrupts(agent)
            try:
                result = agent.run()
            except KeyboardInterrupt:  # before the ranks ran, so there is nothing to save
                return INTERRUPTED
            except SignalException as stopped:
                print(f"megatsp: error: stopped by {stopped.sigval.name}", file=sys.stderr)
                return 128 + stopped.sigval
            finally:
                agent.get_worker_group().spec.rdzv_handler.shutdown()
        assert result is not None
        return _report(result, Path(folder), len(interrupts))


def run_rank(work: Callable[[], int]) -> NoReturn:
    """Runs `work` as a rank and ends the process with the status that it returns.

    An exception goes to the launcher, torch's or ours, which shows it. The process ends without the
    interpreter's teardown: after a failure that can wait for ranks that wait for this one, and after
    success a gloo thread that still lets go of a tensor then aborts it (seen with torch 2.13).
    """
    ours = _die_with_launcher()
    from torch.distributed.elastic.multiprocessing.errors import record

    try:
        status = record(work)() or 0
    except Exception as error:
        if not ours:
            raise
        status = USER_ERROR if is_users(error) else 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def is_users(error: BaseException) -> bool:
    """Whether an error says what a user did: a ValueError that our own code raised."""
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    module = trace.tb_frame.f_globals.get("__name__", "") if trace else ""
    return type(error) is ValueError and module.partition(".")[0] == "megatsp"


def _agent(nproc: int, command: list[str], folder: str) -> "LocalElasticAgent":
    """torch's agent for one node without restarts; a rank's error file goes under `folder`."""
    from torch.distributed.elastic.agent.server.api import WorkerSpec
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.rendezvous import RendezvousParameters
    from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

    rendezvous = RendezvousParameters(
        backend="c10d",
        endpoint="localhost:0",  # any free port
        run_id=f"megatsp-{os.getpid()}",
        min_nodes=1,
        max_nodes=1,
        local_addr="localhost",  # and not the host's name, which need not resolve
    )
    spec = WorkerSpec(
        role="rank",
        local_world_size=nproc,
        entrypoint=command[0],
        args=tuple(command[1:]),
        rdzv_handler=get_rendezvous_handler(rendezvous),
        max_restarts=0,
        monitor_interval=0.1,
        local_addr="localhost",
    )
    return LocalElasticAgent(spec, DefaultLogsSpecs(log_dir=folder), start_method="spawn")


def _rank_environment(nproc: int) -> dict[str, str]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // nproc))),
        "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGTERM,SIGHUP,SIGQUIT",  # SIGINT is ours
        LAUNCHER_PID: str(os.getpid()),
    }


def _pass_on_interrupts(agent: "LocalElasticAgent") -> list[int]:
    """Handles Ctrl-C as the module says; returns the list that grows with each one."""
    interrupts: list[int] = []

    def handle(signum: int, frame: Any) -> None:
        interrupts.append(signum)
        pids = [worker.id for worker in agent.get_worker_group().workers if worker.id]
        if not pids:
            raise KeyboardInterrupt
        if len(interrupts) == 1:
            os.write(2, b"\nmegatsp: finishing this step; Ctrl-C again aborts\n")
        for pid in pids:
            try:
                if len(interrupts) == 1:
                    os.kill(pid, signal.SIGINT)
                else:
                    os.killpg(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass  # it has ended already

    signal.signal(signal.SIGINT, handle)
    return interrupts


@dataclass(frozen=True)
class _Failure:
    rank: int
    status: int  # the exit status that the launcher takes from it
    headline: str
    detail: str = ""  # the traceback


def _report(result: "RunResult", folder: Path, interrupts: int) -> int:
    """Prints why ranks failed, the cause in full and first, and returns the exit status."""
    codes = {rank: failure.exitcode for rank, failure in result.failures.items()}
    if not codes:
        return 0
    if interrupts > 1 or (interrupts and {INTERRUPTED, -signal.SIGINT} & {*codes.values()}):
        return INTERRUPTED
    cause, *others = _failures(codes, folder)
    if cause.status == USER_ERROR:
        print(f"megatsp: error: {cause.headline.removeprefix('ValueError: ')}", file=sys.stderr)
        return USER_ERROR
    print(f"megatsp: error: rank {cause.rank}: {cause.headline}\n{cause.detail}", end="", file=sys.stderr)
    for other in others:
        print(f"  then rank {other.rank}: {other.headline.splitlines()[0]}", file=sys.stderr)
    return cause.status


def _failures(codes: Mapping[int, int], folder: Path) -> list[_Failure]:
    """What happened to each failed rank, the cause first.

    A rank whose peer has died fails too, and may even end sooner. So: a killed rank first (what its
    peers raise comes later), then the exceptions in the order in which they were written down, also
    those of ranks that had not ended yet. SIGTERM is the agent's own, and says nothing.
    """
    killed, raised, ended = [], [], []
    for file in sorted(folder.rglob("error.json"), key=lambda file: file.stat().st_mtime_ns):
        rank, error = int(file.parent.name), json.loads(file.read_text())["message"]
        status = USER_ERROR if codes.get(rank) == USER_ERROR else 1
        raised.append(_Failure(rank, status, error["message"], error["extraInfo"]["py_callstack"]))
    for rank in sorted(codes.keys() - {failure.rank for failure in raised}):
        if codes[rank] >= 0:
            ended.append(_Failure(rank, codes[rank] or 1, f"exited with status {codes[rank]}"))
        elif codes[rank] != -signal.SIGTERM:
            killed.append(_Failure(rank, 128 - codes[rank], f"killed by {_signal_name(-codes[rank])}"))
    return [*killed, *raised, *ended] or [_Failure(min(codes), 128 + signal.SIGTERM, "killed by SIGTERM")]


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _die_with_launcher() -> bool:
    """Asks the kernel to kill this rank when our launcher dies. False under another launcher."""
    launcher = os.environ.get(LAUNCHER_PID)
    if not launcher:
        return False
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(launcher):  # it died before we asked
        os._exit(1)
    return True


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


@contextmanager
def _signals_restored() -> Iterator[None]:
    """Restores the handlers that the agent and we replace."""
    handled = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    before = {number: signal.getsignal(number) for number in handled}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _elastic_is_quiet() -> Iterator[None]:
    """Silences the agent's log, which repeats what we report; LOGLEVEL, elastic's own switch, shows it."""
    before = logging.root.manager.disable
    if "LOGLEVEL" not in os.environ:
        logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
