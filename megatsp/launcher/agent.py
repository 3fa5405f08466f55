"""torch's elastic agent for the ranks of one node of a job, which end together and leave nothing behind."""

import logging
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from megatsp.launcher.fork import GRACE_S, REAPED_S, drop_torn, group_runs
from megatsp.launcher.signals import Signals


@dataclass(frozen=True)
class Nodes:
    """Where this machine stands among those of a job. endpoint: HOST:PORT, at which node 0 listens."""

    index: int
    count: int
    endpoint: str
    timeout_s: int


class Agent(LocalElasticAgent):
    """Starts `command` as `nproc` ranks of this node, once; a rank's error file goes under `folder`.

    ended: the ranks that were killed here, after another one had failed.
    """

    def __init__(
        self,
        nproc: int,
        command: list[str],
        folder: Path,
        signals: Signals,
        nodes: Nodes,
    ) -> None:
        rendezvous = RendezvousParameters(
            backend="static",
            endpoint=nodes.endpoint,
            run_id="megatsp",
            min_nodes=nodes.count,
            max_nodes=nodes.count,
            rank=nodes.index,  # as whoever started them numbers them, and not by their names
            timeout=nodes.timeout_s,
        )
        spec = WorkerSpec(
            role="rank",
            local_world_size=nproc,
            entrypoint=command[0],
            args=tuple(command[1:]),
            rdzv_handler=get_rendezvous_handler(rendezvous),
            max_restarts=0,  # whether ranks start again, the job's script decides
            monitor_interval=0.1,
        )
        super().__init__(spec, DefaultLogsSpecs(log_dir=str(folder)), start_method="spawn")
        self._first = nodes.index * nproc
        self.ended: set[int] = set()
        self._done: set[int] = set()  # ranks that ended with 0
        self._folder, self._signals = folder, signals

    def run_ranks(self) -> dict[int, int]:
        """Waits until all ranks have ended; returns the exit codes of those that failed, by number here."""
        try:
            with _quiet():
                result = self.run()
        except SignalException as stopped:
            self._signals.heard.append(stopped.sigval)
            self._signals.is_hard = True
            return {0: -stopped.sigval}
        assert result is not None
        # torch names ranks by their numbers among all.
        return {rank - self._first: failure.exitcode for rank, failure in result.failures.items()}

    def close(self) -> None:
        """Ends what still runs, and the rendezvous."""
        self.kill()
        self._signals.pids = []
        self.get_worker_group().spec.rdzv_handler.shutdown()

    def kill(self) -> None:
        """Kills every rank with whatever it started, also where the rank itself has failed."""
        for rank, pid in self._pids().items():
            if rank in self._done:  # its number may be another process's by now
                continue
            if self._code(rank) is None:
                self.ended.add(rank)
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)

    def _pids(self) -> dict[int, int]:
        return self._pcontext.pids() if self._pcontext else {}

    def _code(self, rank: int) -> int | None:
        handlers = self._pcontext.subprocess_handlers  # type: ignore[union-attr]
        return handlers[rank].proc.poll()

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, int]:
        self._signals.wait(0)
        pids: dict[int, int] = super()._start_workers(worker_group)
        self._signals.started(list(pids.values()))
        return pids

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        # Before the agent looks: it would send the others SIGTERM, and wait for 30 s.
        for rank, pid in self._pids().items():
            if rank not in self._done and self._code(rank) == 0:
                self._done.add(rank)
                self._signals.pids.remove(pid)
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(pid, signal.SIGKILL)  # what it left
        codes = [self._code(rank) for rank in self._pids()]
        if any(codes):
            end = time.monotonic() + max(GRACE_S.get(code or 0, 0.0) for code in codes)
            while None in codes and time.monotonic() < end and not self._signals.is_hard:
                time.sleep(0.05)
                codes = [self._code(rank) for rank in self._pids()]
            self._kill_and_reap()
        return super()._monitor_workers(worker_group)

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        self._kill_and_reap()
        super()._shutdown(death_sig, timeout)

    def _kill_and_reap(self) -> None:
        self.kill()
        end = time.monotonic() + REAPED_S
        for rank, pid in self._pids().items():
            while time.monotonic() < end and (self._code(rank) is None or group_runs(pid)):
                time.sleep(0.01)
        drop_torn(self._folder)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the agent's log, which repeats what we report; LOGLEVEL, elastic's own switch, shows it."""
    before = logging.root.manager.disable
    if "LOGLEVEL" not in os.environ:
        logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
