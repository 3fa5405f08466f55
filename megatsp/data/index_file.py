"""PREFIX.idx, Megatron's index of a .bin: where each document's tokens are.

magic, version u64, dtype code u8, sequence count S u64, document count u64 (one more than there are), then
sizes int32 [S] in tokens, pointers int64 [S] in bytes, document indices int64 [N+1]: document i is the
sequences from indices[i] up to indices[i+1]. Little-endian. We write one sequence a document.

Source: Megatron-LM, megatron/core/datasets/indexed_dataset.py.
"""

import hashlib
import os
import struct
import tempfile
from collections.abc import Iterator

import numpy as np

from megatsp.data.mapped import map_file

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")  # 34 bytes
DTYPE_OF_CODE = {
    1: "<u1",
    2: "<i1",
    3: "<i2",
    4: "<i4",
    5: "<i8",
    8: "<u2",
}  # 6 and 7 are floats, never tokens
CHUNK = 1 << 18  # entries that are in memory at a time


def token_code(vocab_size: int) -> int:
    """The dtype code that Megatron gives to the ids of so large a vocabulary (DType.optimal_dtype)."""
    return 8 if vocab_size < 65500 else 4


class Index:
    """A memory-mapped .idx file. Opening it reads the header and the last entries alone.

    Attributes:
        dtype: of the tokens.
        num_documents: N, at least 1.
        num_tokens: in all documents.

    Raises:
        ValueError: the file is no index, truncated, of a multimodal data set, or has no documents.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        found_bytes = os.path.getsize(path)
        with open(path, "rb") as file:
            header = file.read(HEADER.size)
        if len(header) < HEADER.size or not header.startswith(MAGIC):
            raise ValueError(f"{path} is not a Megatron index: it does not begin with {MAGIC!r}")
        _, version, code, num_sequences, num_indices = HEADER.unpack(header)
        if version != VERSION:
            raise ValueError(f"{path} has version {version}; only {VERSION} is known")
        if code not in DTYPE_OF_CODE:
            raise ValueError(
                f"{path} has dtype code {code}; integer tokens have one of {sorted(DTYPE_OF_CODE)}"
            )
        if num_sequences == 0 or num_indices < 2:
            raise ValueError(f"{path} has no documents")
        expected_bytes = HEADER.size + 12 * num_sequences + 8 * num_indices
        if found_bytes == expected_bytes + num_sequences:
            raise ValueError(
                f"{path} is of a multimodal data set (a mode follows for each sequence); only text is read"
            )
        if found_bytes != expected_bytes:
            raise ValueError(
                f"{path} is truncated or damaged: it has {found_bytes} bytes, {expected_bytes} expected"
            )
        self.dtype = np.dtype(DTYPE_OF_CODE[code])
        self.num_documents = num_indices - 1
        content = map_file(path, np.uint8, found_bytes)

        def part(begin: int, dtype: str, count: int) -> np.ndarray:
            return content[begin : begin + count * np.dtype(dtype).itemsize].view(dtype)

        self._sizes = part(HEADER.size, "<i4", num_sequences)
        self._pointers = part(HEADER.size + 4 * num_sequences, "<i8", num_sequences)
        self._indices = part(HEADER.size + 12 * num_sequences, "<i8", num_indices)
        self.num_tokens = int(self._pointers[-1]) // self.dtype.itemsize + int(self._sizes[-1])
        if self._indices[0] != 0 or self._indices[-1] != num_sequences:
            raise ValueError(
                f"{path} is damaged: its documents are the sequences {self._indices[0]} to "
                f"{self._indices[-1]} of {num_sequences}; its document indices contradict its sizes"
            )
        if self.num_tokens < 0 or self._pointers[0] != 0:
            raise self._contradiction()

    def span(self, document: int) -> tuple[int, int]:
        """Position of a document's first token in the .bin, and of the token after its last one."""
        return self._start(document), self._start(document + 1)

    def checked_sizes(self) -> tuple[np.ndarray, str]:
        """Tokens of each document, int32 or int64 [N] on disk, and their sha256 as int64.

        All that takes time in proportion to the number of documents is checked here, a chunk at a time.

        Raises:
            ValueError: sizes, pointers and document indices contradict each other, or leave gaps.
        """
        self._check_sequences()
        one_each = self.num_documents == len(self._sizes)
        digest = hashlib.sha256()
        sizes = self._sizes if one_each else _scratch(self.num_documents)
        for begin, end in _chunks(self.num_documents):
            indices = self._indices[begin : end + 1]
            if (np.diff(indices) < 0).any():
                raise self._contradiction()
            if one_each and not np.array_equal(indices, np.arange(begin, end + 1)):  # some are empty
                one_each, sizes = False, _scratch(self.num_documents)
                sizes[:begin] = self._sizes[:begin]
            if not one_each:
                sizes[begin:end] = np.diff(self._starts(indices))
            digest.update(sizes[begin:end].astype("<i8").tobytes())
        return sizes, digest.hexdigest()

    def _check_sequences(self) -> None:
        expected = 0
        for begin, end in _chunks(len(self._sizes)):
            sizes = self._sizes[begin:end].astype(np.int64)
            ends = expected + np.cumsum(sizes) * self.dtype.itemsize
            if (sizes < 0).any():
                raise self._contradiction()
            pointers = ends - sizes * self.dtype.itemsize
            wrong = np.flatnonzero(self._pointers[begin:end] != pointers)
            if wrong.size:
                at = int(wrong[0])
                raise ValueError(
                    f"{self._path} is damaged or not contiguous: sequence {begin + at} is at byte "
                    f"{self._pointers[begin + at]}, the ones before it end at {pointers[at]}; its sizes, "
                    "pointers and document indices contradict each other"
                )
            expected = int(ends[-1])

    def _start(self, document: int) -> int:
        sequence = int(self._indices[document])
        if not 0 <= sequence <= len(self._sizes):
            raise self._contradiction()
        if sequence == len(self._sizes):
            return self.num_tokens
        return int(self._pointers[sequence]) // self.dtype.itemsize

    def _starts(self, indices: np.ndarray) -> np.ndarray:
        if indices[0] < 0 or indices[-1] > len(self._sizes):  # they ascend
            raise self._contradiction()
        last = len(self._sizes) - 1
        starts = self._pointers[np.minimum(indices, last)] // self.dtype.itemsize
        starts[indices > last] = self.num_tokens
        return starts

    def _contradiction(self) -> ValueError:
        return ValueError(
            f"{self._path} is damaged: its sizes, pointers and document indices contradict each other"
        )


def write_index(path: str, sizes_path: str, code: int) -> tuple[int, int, str]:
    """Write the .idx of documents whose sizes, int32, are the content of `sizes_path`.

    Returns:
        documents, their tokens, and the sha256 of the sizes as int64.
    """
    sizes = np.memmap(sizes_path, dtype="<i4", mode="r")
    itemsize = np.dtype(DTYPE_OF_CODE[code]).itemsize
    digest = hashlib.sha256()
    num_tokens = 0
    with open(path, "wb") as file:
        file.write(HEADER.pack(MAGIC, VERSION, code, len(sizes), len(sizes) + 1))
        for begin, end in _chunks(len(sizes)):
            file.write(sizes[begin:end].tobytes())
        for begin, end in _chunks(len(sizes)):
            part = sizes[begin:end].astype("<i8")
            digest.update(part.tobytes())
            ends = num_tokens + np.cumsum(part)
            file.write(((ends - part) * itemsize).astype("<i8").tobytes())
            num_tokens = int(ends[-1])
        for begin, end in _chunks(len(sizes) + 1):
            file.write(np.arange(begin, end, dtype="<i8").tobytes())
        file.flush()
        os.fsync(file.fileno())
    return len(sizes), num_tokens, digest.hexdigest()


def _chunks(count: int) -> Iterator[tuple[int, int]]:
    for begin in range(0, count, CHUNK):
        yield begin, min(begin + CHUNK, count)


def _scratch(count: int) -> np.ndarray:
    """int64 [count] in a file without a name: it takes disk, not memory, and goes with the last reference."""
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, dtype=np.int64, mode="w+", shape=(count,))
