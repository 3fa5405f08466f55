"""Micro-batches of one rank, read ahead by worker processes, in an order that no worker changes.

A rank asks for its own positions of its own samples; the processes that read share nothing but the files.
"""

import gc
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from megatsp.data.blend import Blend, Draw
from megatsp.data.dataset import Span
from megatsp.schema import DataConfig

T = TypeVar("T")

# ids, labels [B, T_local] int64 and mask float32, of this rank's positions; first [B, T] int64, or None.
HostBatch = tuple[Tensor, Tensor, Tensor, Tensor | None]


@dataclass(frozen=True)
class Share:
    """Which part of every global batch is this rank's: its samples, and its positions in each."""

    global_batch_size: int
    micro_batch_size: int
    dp_rank: int
    dp_size: int
    spans: tuple[Span, ...]

    @property
    def num_micro_batches(self) -> int:
        """Of one global batch."""
        return self.global_batch_size // (self.micro_batch_size * self.dp_size)

    def micro_batches(self, samples: Sequence[T]) -> list[list[T]]:
        """This rank's, of a global batch: sample j of the m-th is samples[(m dp_size + dp_rank) B + j]."""
        size = self.micro_batch_size
        begins = range(self.dp_rank * size, self.global_batch_size, self.dp_size * size)
        return [list(samples[begin : begin + size]) for begin in begins]


Ranges = Sequence[tuple[int, int]]  # [start, stop) of places of the order, ascending and apart


def next_runs(cursor: int, count: int, left_out: Ranges = ()) -> list[tuple[int, int]]:
    """The `count` places of the order from `cursor` on that are not left out, as runs [start, stop)."""
    runs = []
    for start, stop in left_out:
        if cursor < start:
            end = min(start, cursor + count)
            runs.append((cursor, end))
            count -= end - cursor
        if not count:
            return runs
        cursor = max(cursor, stop)
    return [*runs, (cursor, cursor + count)]


def next_draws(blend: Blend, cursor: int, count: int, left_out: Ranges = ()) -> tuple[list[Draw], int]:
    """What is at these places, and the place after the last of them: the next cursor."""
    runs = next_runs(cursor, count, left_out)
    return [draw for start, stop in runs for draw in blend.draw(start, stop - start)], runs[-1][1]


class Loader:
    """The rank's micro-batches from place `cursor` of the order on, without end.

    Its processes end by `close`, and also when this process dies.

    Args:
        cursor: place of the order that comes next: all ranks consumed those before.
        pin: into memory that a GPU reads from directly.
        left_out: places that are jumped over.

    Raises:
        ValueError: from `next`: data that cannot be read.
    """

    def __init__(
        self,
        blend: Blend,
        cursor: int,
        share: Share,
        config: DataConfig,
        pin: bool,
        left_out: Ranges = (),
    ) -> None:
        workers = config.num_workers
        ahead: dict[str, Any] = dict(
            num_workers=workers, prefetch_factor=config.prefetch_factor, multiprocessing_context="forkserver",
            worker_init_fn=_prepare,
        )  # fmt: skip
        loader = DataLoader(
            _Reader(blend, share.spans),
            batch_size=None,  # a draw of the sampler is a whole micro-batch
            sampler=_Order(blend, cursor, share, left_out),
            generator=torch.Generator(),  # it draws a seed, which nothing here uses
            pin_memory=pin,
            **(ahead if workers else {}),
        )
        with _unsignalled():  # processes start, and read ahead
            self._iterator: Iterator[HostBatch | str] | None = iter(loader)

    def __next__(self) -> HostBatch:
        assert self._iterator is not None
        batch = next(self._iterator)
        if isinstance(batch, str):
            raise ValueError(batch)
        return batch

    def close(self) -> None:
        """Ends the processes that read."""
        self._iterator = None
        gc.collect()  # now, while the queues' semaphores can still be given back


class _Order:
    """Every micro-batch of this rank, one after the other."""

    def __init__(self, blend: Blend, cursor: int, share: Share, left_out: Ranges) -> None:
        self._blend, self._cursor, self._share, self._left_out = blend, cursor, share, left_out

    def __iter__(self) -> Iterator[list[Draw]]:
        size, cursor = self._share.global_batch_size, self._cursor
        while True:
            draws, cursor = next_draws(self._blend, cursor, size, self._left_out)
            yield from self._share.micro_batches(draws)


class _Reader(Dataset[HostBatch | str]):
    def __init__(self, blend: Blend, spans: tuple[Span, ...]) -> None:
        self._blend, self._spans = blend, spans

    def __getitem__(self, draws: list[Draw]) -> HostBatch | str:
        try:
            return read_batch(self._blend, draws, self._spans)
        except ValueError as error:  # the user's: said once, without a process's traceback
            return str(error)


def read_batch(blend: Blend, draws: Sequence[Draw], spans: Sequence[Span] | None = None) -> HostBatch:
    """The samples of one micro-batch, at these positions or all; in this process."""
    samples = [blend.sample(draw, spans) for draw in draws]
    columns = zip(*(sample[:3] for sample in samples), strict=True)
    tokens, labels, mask = map(_stacked, columns)
    firsts = [sample.first for sample in samples if sample.first is not None]  # of all samples, or of none
    return tokens, labels, mask, _stacked(firsts) if firsts else None


def _stacked(rows: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(rows[0][None] if len(rows) == 1 else np.stack(rows))


_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@contextmanager
def _unsignalled() -> Iterator[None]:
    """Inside, processes start that do not hear a scheduler's signals, which it may send to every process.

    The rank decides when it ends; readers that died of the signal would keep it from saving.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        resource_tracker.ensure_running()  # which unblocks SIGTERM when it starts
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _prepare(worker: int) -> None:
    """Ctrl-C reaches every process of the terminal: the rank decides when it ends, and readers end with it.

    torch's own watch looks at the process that forked the reader, which readers keep alive: so when a rank is
    killed they would stay.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    rank = multiprocessing.parent_process()
    assert rank is not None

    def end_with_the_rank() -> None:
        multiprocessing.connection.wait([rank.sentinel])
        os._exit(0)

    threading.Thread(target=end_with_the_rank, daemon=True).start()
