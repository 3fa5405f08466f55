"""The safetensors format, by hand: checked headers, slices that are views, files written tensor by tensor.

A file is the header's length (8 bytes, little-endian), the header (JSON: dtype, shape and place of every
tensor) and the tensors' bytes, one after another.

Source: https://github.com/huggingface/safetensors#format
"""

import json
import math
import mmap
import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
SHORT = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}  # as our options spell them
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Types that only a refusal needs to know: quantised weights, and what goes with them.
_WIDTHS = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BOOL": 1, "C64": 8,
}  # fmt: skip
_LONGEST_HEADER = 100_000_000
_SYNC_BYTES = 1 << 28  # written between two calls that bring them to the disk
_FIX = "download or copy it again"

Box = tuple[slice, ...]


class Digest(Protocol):
    """A checksum in the making, of hashlib or xxhash."""

    def update(self, data: bytes | memoryview, /) -> None: ...

    def hexdigest(self) -> str: ...


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: its bytes are [start, stop) of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors of a file in the order of their bytes, and its metadata.

    Raises:
        ValueError: the file cannot be read, is cut off, or its header contradicts it or itself.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(_LONGEST_HEADER, size - 8):
                raise ValueError(f"its header would have {length} bytes, the whole file has {size}")
            content = json.loads(file.read(length))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged: no readable header: {error}; {_FIX}") from None
    try:
        metadata = content.pop("__metadata__", None) or {}
        found = {name: _entry(value, 8 + length) for name, value in content.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__} {error}"
        raise ValueError(f"{path} is damaged: its header is not laid out as one: {reason}; {_FIX}") from None
    entries = dict(sorted(found.items(), key=lambda item: (item[1].start, item[1].stop)))
    place = 8 + length
    for name, entry in entries.items():
        wanted = math.prod(entry.shape) * _WIDTHS.get(entry.dtype, 0)
        if entry.dtype in _WIDTHS and entry.stop - entry.start != wanted:
            raise ValueError(
                f"{path} is damaged: {name}, {entry.dtype} {entry.shape}, has {entry.stop - entry.start} "
                f"bytes instead of {wanted}; {_FIX}"
            )
        if entry.start != place:
            raise ValueError(
                f"{path} is damaged: {name} begins at byte {entry.start}, what is before it ends at {place}; "
                f"{_FIX}"
            )
        place = entry.stop
    if place != size:
        kind = "is cut off" if size < place else "is damaged"
        raise ValueError(f"{path} {kind}: by its header it has {place} bytes, but it has {size}; {_FIX}")
    return entries, metadata


def _entry(value: Mapping[str, Any], begin: int) -> Entry:
    start, stop = value["data_offsets"]
    shape = tuple(value["shape"])
    if not all(type(n) is int and n >= 0 for n in (*shape, start, stop)) or stop < start:
        raise ValueError(f"shape {shape}, bytes {start} to {stop}")
    return Entry(str(value["dtype"]), shape, begin + start, begin + stop)


class TensorFile:
    """The tensors of one file, as views of the mapped file: they are read when they are copied.

    entries: of its header, where that was read and checked before; `metadata` is then empty.

    Raises:
        ValueError: see `read_header`.
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path, entries: Mapping[str, Entry] | None = None) -> None:
        self.path = path
        self.entries: Mapping[str, Entry]
        self.entries, self.metadata = read_header(path) if entries is None else (entries, {})
        with path.open("rb") as file:
            # Copy on write: torch wants memory that it may write to, and nobody does.
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)

    def view(self, name: str, box: Box = ()) -> Tensor:
        """A tensor as it is stored, or the part of it that `box` slices out."""
        entry = self.entries[name]
        dtype = DTYPES[entry.dtype]
        flat = self._bytes[entry.start : entry.stop]
        if entry.start % dtype.itemsize:
            flat = flat.clone()  # written by another hand, without padding
        return flat.view(dtype).view(entry.shape)[box]

    def release(self, name: str) -> None:
        """Lets go of the memory that holds what was read of a tensor; it can be read again."""
        entry = self.entries[name]
        start = entry.start - entry.start % mmap.PAGESIZE
        self._map.madvise(mmap.MADV_DONTNEED, start, entry.stop - start)


class TensorWriter:
    """Writes one file, a tensor at a time, in the order of `shapes`; use it as a context manager.

    Meanwhile threads bring what is written to the disk and feed every byte to `digest`.

    dtypes: by name, as in the header (F32, BF16, F16). num_bytes: of the file, so far.
    """

    def __init__(
        self,
        path: Path,
        shapes: Mapping[str, tuple[int, ...]],
        dtypes: Mapping[str, str],
        metadata: Mapping[str, str],
        digest: Digest | None = None,
    ) -> None:
        self._left = dict(shapes)
        self._dtypes = dtypes
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        place = 0
        for name, shape in shapes.items():
            stop = place + math.prod(shape) * DTYPES[dtypes[name]].itemsize
            header[name] = {"dtype": dtypes[name], "shape": list(shape), "data_offsets": [place, stop]}
            place = stop
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._file = path.open("wb", buffering=0)
        self._hash = digest
        self.num_bytes = 0
        self._hasher, self._syncer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._hashed: Future[None] | None = None
        self._synced: Future[None] | None = None
        self._unsynced_bytes = 0
        self._put(len(text).to_bytes(8, "little") + text)

    def __enter__(self) -> "TensorWriter":
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """The next tensor; it is cast if need be."""
        expected = next(iter(self._left))
        assert name == expected and tuple(tensor.shape) == self._left.pop(name), (name, tensor.shape)
        stored = tensor.detach().to("cpu", DTYPES[self._dtypes[name]]).contiguous()
        if stored.numel():
            self._put(stored.view(-1).view(torch.uint8).numpy().data)

    def _put(self, data: bytes | memoryview) -> None:
        if self._hashed is not None:
            self._hashed.result()  # one tensor waits to be hashed, not all of them
        if self._hash is not None:
            self._hashed = self._hasher.submit(self._hash.update, data)
        written = 0
        while written < len(data):  # a single call writes 2 GiB at most
            written += self._file.write(data[written:])
        self.num_bytes += len(data)
        self._unsynced_bytes += len(data)
        if self._unsynced_bytes >= _SYNC_BYTES and (self._synced is None or self._synced.done()):
            if self._synced is not None:
                self._synced.result()  # a full disk is told once
            self._synced = self._syncer.submit(os.fdatasync, self._file.fileno())
            self._unsynced_bytes = 0

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._hasher.shutdown()
        self._syncer.shutdown()
        with self._file:
            if kind is None:
                assert not self._left, list(self._left)
                for future in (self._hashed, self._synced):
                    if future is not None:
                        future.result()
                os.fsync(self._file.fileno())
