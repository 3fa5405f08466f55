"""Saves beside training, which waits for the copy to host memory alone."""

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatsp.checkpoint import store
from megatsp.checkpoint.paths import BEST, folder_of, replace_text
from megatsp.checkpoint.retention import retain
from megatsp.checkpoint.staging import Staging
from megatsp.checkpoint.state import RunState
from megatsp.data.tokenizer import Tokenizer
from megatsp.schema import CheckpointConfig

_LONGEST_BACKOFF_S = 60.0
_LOOKS_EVERY_S = 0.2  # whether the program has ended
_SLOWEST_DISK = timedelta(days=1)  # what ranks wait for each other: a slow one is no hang


@dataclass(frozen=True)
class Saved:
    """A checkpoint is whole, and LATEST names it.

    stall_ms: that training stood still, of the rank where it was longest; with what it waited for the save
    before. seconds: from then until it was whole. bytes: of all its files, but the manifest. problem: why
    old checkpoints were not removed or BEST not moved; "": done.
    """

    folder: Path
    iteration: int
    stall_ms: float
    seconds: float
    bytes: int
    problem: str = ""


@dataclass(frozen=True)
class Failed:
    """A checkpoint could not be written; what was there is as it was.

    retry_s: seconds until it is written again; None: it is lost.
    """

    iteration: int
    reason: str
    retry_s: float | None


@dataclass(frozen=True)
class _Job:
    state: RunState
    tensors: Mapping[str, Tensor]
    extra: Mapping[str, bytes]
    tokenizer: Tokenizer | None
    best: int | None
    keep: frozenset[int]
    since: float  # of time.perf_counter()


class Saver:
    """A run's saves, at most one in flight. All ranks make one, and call save and close in the same order.

    A thread on every rank writes a copy; these speak with each other over a group of their own, so that they
    go on whatever training does. A write that fails on any rank fails on all. It is tried again after a
    backoff, which doubles, until it is whole or a newer save() takes its place.
    """

    def __init__(
        self,
        checkpoints: Path,
        config: CheckpointConfig,
        retry_s: float = 5.0,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        """retry_s: the first backoff in seconds. beat: called while a save is waited for that gets on."""
        self._beat = beat
        self._checkpoints, self._config, self._retry_s = checkpoints, config, retry_s
        self._group: Any = dist.new_group(backend="gloo", timeout=_SLOWEST_DISK)
        self._staging = Staging(self._group)
        self._outcomes: deque[Saved | Failed] = deque()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._waited_s = 0.0
        # What this rank's training asks of the thread, where that waits between two attempts.
        self._asked, self._gives_up, self._closes = threading.Event(), False, False

    def save(
        self,
        state: RunState,
        tensors: Mapping[str, Tensor],
        extra: Mapping[str, bytes],
        tokenizer: Tokenizer | None,
        best: int | None = None,
        keep: Collection[int] = (),
    ) -> None:
        """Saves what the tensors are now; they may change once it returns. Waits for an earlier save.

        tensors: by name, as `store.named_tensors` gives them. best: the iteration that BEST names once this
        one is whole; 0: none; None: as it was. keep: further iterations that are not removed.
        """
        self.settle()
        since, self._waited_s = time.perf_counter() - self._waited_s, 0.0
        job = _Job(state, {}, extra, tokenizer, best, frozenset(keep), since)
        on_host = not any(tensor.is_cuda for tensor in tensors.values())
        if self._config.async_save:
            job = replace(job, tensors=self._staging.copy(tensors))
            self._start(job, 1e3 * (time.perf_counter() - since), waits=False)
            return
        job = replace(job, tensors=self._staging.view(tensors) if on_host else self._staging.copy(tensors))
        self._start(job, None, waits=False)
        self._wait()
        self._asked.clear()
        if isinstance(self._outcomes[-1], Failed):
            if on_host:  # training has not gone on: a copy made now is the same
                job = replace(job, tensors=self._staging.copy(tensors))
            self._start(job, 1e3 * (time.perf_counter() - since), waits=True)

    def settle(self) -> None:
        """Waits until nothing is in flight; one that fails is given up; on all ranks.

        The time counts as the next save's stall.
        """
        since = time.perf_counter()
        self._gives_up = True
        self._wait()
        self._asked.clear()
        self._gives_up = False
        self._waited_s += time.perf_counter() - since

    @property
    def finished(self) -> bool:
        """Whether this rank has something to collect.

        Raises:
            RuntimeError: another rank has gone.
        """
        self._raise()
        return bool(self._outcomes)

    def collect(self) -> Saved | Failed | None:
        """What became of an attempt to write, each once, in order; None: nothing new. It does not wait.

        All ranks are given the same if they call it once all are `finished`.
        """
        self._raise()
        return self._outcomes.popleft() if self._outcomes else None

    def close(self) -> Saved | Failed | None:
        """Waits for the write in flight and tries one that failed a last time; returns what became of it.

        None: nothing new since `collect`, which has the older news. No save after it.
        """
        self._closes = True
        if self._group is None:  # closed before
            return None
        try:
            self._wait()
            return self._outcomes.pop() if self._outcomes else None
        finally:
            self._staging.close()
            dist.destroy_process_group(self._group)
            self._group = None

    def _start(self, job: _Job, stall_ms: float | None, waits: bool) -> None:
        work = (job, stall_ms, waits)
        self._thread = threading.Thread(target=self._run, args=work, name="checkpoint")
        self._thread.start()

    def _wait(self) -> None:
        """Until no thread of ours runs."""
        self._asked.set()
        written = -1
        while self._thread is not None:
            self._thread.join(_LOOKS_EVERY_S)
            if not self._thread.is_alive():
                self._thread = None
            elif (now := self._written()) != written:  # a slow disk is no hang, a rank that stopped is one
                written = now
                self._beat()
        self._raise()

    def _written(self) -> int:
        """Bytes of the save in flight that its files have so far, of all ranks, as this host sees them."""
        sizes = 0
        for folder in self._checkpoints.glob("iter_*.tmp"):
            with suppress(OSError):  # renamed meanwhile
                sizes += sum(path.stat().st_size for path in folder.iterdir())
        return sizes

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self, job: _Job, stall_ms: float | None, waits: bool) -> None:
        """The thread: writes until it is whole or given up; once, if training waits for it (no stall_ms)."""
        backoff_s, closes = self._retry_s, False
        try:
            while True:
                if waits:
                    gives_up, closes = self._rest(backoff_s)
                    if gives_up:
                        reason = "a newer one takes its place"
                        self._outcomes.append(Failed(job.state.iteration, reason, None))
                        return
                    backoff_s = min(2 * backoff_s, _LONGEST_BACKOFF_S)
                outcome = self._attempt(job, stall_ms, None if closes else backoff_s)
                self._outcomes.append(outcome)
                if closes or stall_ms is None or isinstance(outcome, Saved):
                    return
                waits = True
        except BaseException as error:  # it is raised where training sees it
            self._error = error

    def _rest(self, seconds: float) -> tuple[bool, bool]:
        """Waits between two attempts; whether a rank gives this save up, and whether one closes."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and not self._asked.wait(min(left, _LOOKS_EVERY_S)):
            if not threading.main_thread().is_alive():  # it ended without close()
                return True, False
        # Some ranks may have been asked, and others not yet: all do what any of them was asked for.
        asked = torch.tensor([self._gives_up, self._closes], dtype=torch.uint8)
        dist.all_reduce(asked, dist.ReduceOp.MAX, group=self._group)
        gives_up, closes = asked.tolist()
        return bool(gives_up), bool(closes)

    def _attempt(self, job: _Job, stall_ms: float | None, retry_s: float | None) -> Saved | Failed:
        """Writes once, on all ranks, which learn the same. stall_ms: None: training waits all the time."""
        folder, num_bytes, reason, problem = Path(), 0, "", ""
        tensors = dict(job.tensors)
        try:
            written = store.write(
                self._checkpoints, job.state, tensors, job.extra, job.tokenizer, self._group
            )
            folder, num_bytes = written.folder, written.bytes
        except (ValueError, RuntimeError) as error:  # all ranks have one, or the next call has it too
            reason = str(error)
        seconds = time.perf_counter() - job.since
        if not reason and dist.get_rank() == 0:
            problem = self._tidy(job)
        if stall_ms is None:
            stall_ms = 1e3 * (time.perf_counter() - job.since)
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, (reason, problem, stall_ms, seconds), group=self._group)
        reasons, problems, stalls, times = zip(*found, strict=True)
        if any(reasons):
            return Failed(job.state.iteration, next(filter(None, reasons)), retry_s)
        return Saved(folder, job.state.iteration, max(stalls), max(times), num_bytes, problems[0])

    def _tidy(self, job: _Job) -> str:
        """Moves BEST and removes old checkpoints; why that failed, for the new one is whole all the same."""
        pointer = self._checkpoints / BEST
        try:
            if job.best and folder_of(self._checkpoints, job.best).is_dir():
                replace_text(pointer, f"{job.best}\n")
            elif job.best is not None:
                pointer.unlink(missing_ok=True)
            retain(self._checkpoints, self._config.keep_last, self._config.keep_every, job.keep)
        except OSError as error:
            return f"old checkpoints are left: {error}"
        return ""
