"""Worker processes that partitions are dealt to, one at a time; all of them end with the pool."""

import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Self

from megatsp.data.preprocess.part import Setup
from megatsp.data.preprocess.sources import Piece
from megatsp.data.preprocess.worker import Failure, Report

# A worker is one thread: there is one a core.
ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "RAYON_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "ARROW_DEFAULT_MEMORY_POOL": "system",
}
# All processes of a Slurm step get SIGTERM; the parent alone answers it, and kills its workers.
COMMAND = "import signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
COMMAND += "from megatsp.data.preprocess.worker import main; main(int(sys.argv[1]))"


class WorkerDied(Exception):
    """A worker process ended without a word: it was killed, or a library crashed.

    Attributes:
        index: of its partition; -1 before it had one.
    """

    def __init__(self, index: int, message: str) -> None:
        super().__init__(message)
        self.index = index


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    connection: Connection
    index: int = -1  # of its partition


class Pool:
    """Use it as a context manager: leaving the block ends every worker.

    Args:
        num_workers: processes; no more are started than there are partitions.
        setup: of the job.
    """

    def __init__(self, num_workers: int, setup: Setup) -> None:
        self._num_workers, self._setup = num_workers, setup
        self._workers: list[_Worker] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.connection.close()
            worker.process.kill()  # what it has not finished is made again anyway
        for worker in self._workers:
            worker.process.wait()

    def run(
        self, partitions: Sequence[tuple[int, list[Piece]]], tick_s: float
    ) -> Iterator[tuple[int, Report | None]]:
        """What becomes of partitions (index, pieces), as it happens; (-1, None) when nothing did for a while.

        Raises:
            ValueError: a bad record or another mistake of the user's.
            OSError: the disk is full, for example.
            WorkerDied: a worker was killed.
            RuntimeError: a bug, with the worker's traceback.
        """
        waiting = deque(partitions)
        for _ in range(min(self._num_workers, len(waiting))):
            self._start()
        for worker in self._workers:
            self._give(worker, waiting)
        while busy := {w.connection: w for w in self._workers if w.index >= 0}:
            ready = wait(list(busy), timeout=tick_s)
            if not ready:
                yield -1, None
            for connection in ready:
                worker = busy[connection]  # type: ignore[index]
                report = self._receive(worker)
                index = worker.index
                if report.finished:
                    self._give(worker, waiting)
                yield index, report

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-c", COMMAND, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=os.environ | ENVIRONMENT,
                process_group=0,  # Ctrl-C reaches the parent alone
            )
        self._workers.append(_Worker(process, Connection(ours.detach())))
        self._send(self._workers[-1], self._setup)

    def _give(self, worker: _Worker, waiting: deque[tuple[int, list[Piece]]]) -> None:
        if waiting:
            worker.index, pieces = waiting.popleft()
            self._send(worker, (worker.index, pieces))
        else:
            worker.index = -1
            self._send(worker, None)

    def _send(self, worker: _Worker, message: object) -> None:
        try:
            worker.connection.send(message)
        except (BrokenPipeError, ConnectionResetError):
            while True:
                self._receive(worker)  # its last message says why

    def _receive(self, worker: _Worker) -> Report:
        try:
            message = worker.connection.recv()
        except (EOFError, ConnectionResetError):
            raise WorkerDied(worker.index, _how_it_ended(worker.process.wait())) from None
        if isinstance(message, Report):
            return message
        assert isinstance(message, Failure), message
        if message.kind == "disk":
            raise OSError(message.message)
        if message.kind == "bug":
            raise RuntimeError(f"a worker failed on partition {worker.index}\n{message.message}")
        raise ValueError(message.message)


def _how_it_ended(status: int) -> str:
    if status == -signal.SIGKILL:
        return "was killed (by hand, or by the out-of-memory killer: see dmesg; lower --workers)"
    if status < 0:
        return f"crashed ({signal.Signals(-status).name})"
    return f"ended with status {status}"
