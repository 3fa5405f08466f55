"""Files that may be compressed, which their names say."""

import gzip
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

from megatsp.data.preprocess.inputs import compression

LONGEST_WINDOW_BYTES = 1 << 31  # that of zstd --long=31; a file claims what it was made with


@contextmanager
def open_input(path: str) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """A file to read, decompressed by its suffix, and the file below whose position tells the progress.

    Raises:
        EOFError: the compressed data ends in the middle.
        OSError, zlib.error: the file cannot be read.
    """
    with open(path, "rb", buffering=0) as raw:
        how = compression(path)
        if how and not os.fstat(raw.fileno()).st_size:  # even nothing has a header
            raise EOFError("the compressed data ends")
        if how == ".gz":
            with gzip.GzipFile(fileobj=raw, mode="rb") as file:
                yield cast(BinaryIO, file), raw
        elif how == ".zst":
            yield io.BufferedReader(_ZstdFile(raw), 1 << 17), raw
        else:
            yield io.BufferedReader(raw, 1 << 17), raw


class _ZstdFile(io.RawIOBase):
    """The content of a .zst; unlike the library's reader it tells a truncated file from a whole one."""

    def __init__(self, raw: BinaryIO) -> None:
        import zstandard

        self._raw, self._library = raw, zstandard
        self._frame = self._new_frame()
        self._input, self._output = b"", memoryview(b"")
        self._begun = False  # whether the frame at hand has begun: a file ends between frames

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            if not self._input:
                self._input = self._raw.read(1 << 14)
            if not self._input:
                if self._begun:
                    raise EOFError("the compressed data ends")
                return 0
            self._begun = True
            try:
                self._output = memoryview(self._frame.decompress(self._input))
            except self._library.ZstdError as error:
                raise OSError(str(error)) from None
            self._input = b""
            if self._frame.eof:
                self._input, self._begun = self._frame.unused_data, False
                self._frame = self._new_frame()
        count = min(len(buffer), len(self._output))
        buffer[:count], self._output = self._output[:count], self._output[count:]
        return count

    def _new_frame(self) -> Any:
        return self._library.ZstdDecompressor(max_window_size=LONGEST_WINDOW_BYTES).decompressobj()
