"""How far a job is: a bar on a terminal, otherwise a line now and then."""

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from tqdm import tqdm

from megatsp.data.preprocess.part import Part


class Progress:
    """Use it as a context manager.

    Args:
        total_bytes: of the input.
        parts: of partitions that are finished already, by index; it is kept up to date from then on.
        interval_s: between lines.
    """

    def __init__(self, total_bytes: int, parts: Mapping[int, Part], interval_s: float) -> None:
        self.parts = dict(parts)
        self._total_bytes, self._interval_s = total_bytes, interval_s
        self._begun_bytes = self._bytes()
        self._started = self._last = time.perf_counter()
        self._bar: tqdm | None = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=self._total_bytes,
                initial=self._begun_bytes,
                unit="B",
                unit_scale=True,
                dynamic_ncols=True,
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, index: int, part: Part) -> None:
        """Partition `index` is as far as `part` says."""
        self.parts[index] = part
        if self._bar is not None:
            self._bar.set_postfix_str(self._counts(), refresh=False)
            self._bar.update(self._bytes() - self._bar.n)

    def tick(self) -> None:
        """Prints a line if it is time."""
        now = time.perf_counter()
        if self._bar is None and now - self._last >= self._interval_s:
            self._last = now
            print(self.line(), file=sys.stderr, flush=True)

    def line(self) -> str:
        """Where it is, how fast, how long it takes from here."""
        done, seconds = self._bytes(), time.perf_counter() - self._started
        speed = (done - self._begun_bytes) / max(seconds, 1e-9)
        left_s = int((self._total_bytes - done) / speed) if speed else 0
        return (
            f"{done / 1e6:.1f} of {self._total_bytes / 1e6:.1f} MB, {speed / 1e6:.2f} MB/s, "
            f"{self._counts()}, {left_s // 3600}:{left_s // 60 % 60:02}:{left_s % 60:02} left"
        )

    def _bytes(self) -> int:
        return sum(part.input_bytes for part in self.parts.values())

    def _counts(self) -> str:
        documents = sum(next(iter(part.counts.values())).documents for part in self.parts.values())
        tokens = sum(count.tokens for part in self.parts.values() for count in part.counts.values())
        return f"{documents} documents, {tokens} tokens"
