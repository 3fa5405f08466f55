"""torch's elastic agent for the ranks of one attempt, which end together and leave nothing behind."""

import json
import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from megatsp.exit_status import HANG, REQUEUE
from megatsp.launcher.signals import Signals

# How long the other ranks may go on after one ended with this status: all end in good order then, or write
# their stacks. After any other they wait for it in vain.
_GRACE_S = {REQUEUE: 30.0, HANG: 3.0}
_REAPED_S = 5.0  # until the kernel has taken a killed process away


@dataclass(frozen=True)
class Nodes:
    """Where this machine stands among those of a job. endpoint: HOST:PORT, at which node 0 listens."""

    index: int
    count: int
    endpoint: str
    timeout_s: int


class Agent(LocalElasticAgent):
    """Starts `command` as `nproc` ranks, once; a rank's error file goes under `folder`.

    attempt: 0 for the first one; the ranks' TORCHELASTIC_RESTART_COUNT. nodes: None for this machine alone.
    ended: the ranks that were killed here, after another one had failed.
    """

    def __init__(
        self,
        nproc: int,
        command: list[str],
        folder: Path,
        signals: Signals,
        attempt: int,
        nodes: Nodes | None = None,
    ) -> None:
        if nodes is None:
            rendezvous = RendezvousParameters(
                backend="c10d",
                endpoint="localhost:0",  # any free port
                run_id=f"megatsp-{os.getpid()}",
                min_nodes=1,
                max_nodes=1,
                local_addr="localhost",  # and not the host's name, which need not resolve
            )
        else:  # nodes are numbered by whoever started them, and not by their names
            rendezvous = RendezvousParameters(
                backend="static",
                endpoint=nodes.endpoint,
                run_id="megatsp",
                min_nodes=nodes.count,
                max_nodes=nodes.count,
                rank=nodes.index,
                timeout=nodes.timeout_s,
            )
        spec = WorkerSpec(
            role="rank",
            local_world_size=nproc,
            entrypoint=command[0],
            args=tuple(command[1:]),
            rdzv_handler=get_rendezvous_handler(rendezvous),
            max_restarts=attempt,
            monitor_interval=0.1,
            local_addr="localhost" if nodes is None else None,
        )
        super().__init__(spec, DefaultLogsSpecs(log_dir=str(folder)), start_method="spawn")
        self._remaining_restarts = 0  # the next attempt has an agent of its own, and no store of this one's
        self.ended: set[int] = set()
        self._done: set[int] = set()  # ranks that ended with 0
        self._folder, self._signals = folder, signals

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
            end = time.monotonic() + max(_GRACE_S.get(code or 0, 0.0) for code in codes)
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
        end = time.monotonic() + _REAPED_S
        for rank, pid in self._pids().items():
            while time.monotonic() < end and (self._code(rank) is None or _runs(pid)):
                time.sleep(0.01)
        for file in self._folder.rglob("error.json"):
            try:
                json.loads(file.read_text())
            except ValueError:  # a rank was killed while it wrote it
                file.unlink()


def _runs(group: int) -> bool:
    """Whether a process of this group runs: what a rank started may outlive it, with the run's lock."""
    for process in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError):
            state, _, process_group = process.read_text().rpartition(")")[2].split()[:3]
            if int(process_group) == group and state not in "ZX":
                return True
    return False
