"""Tokenised documents on disk: Megatron's .bin/.idx pair, and a .json that says how it was made.

PREFIX.bin   the tokens of all documents, one after the other, each document ending with eod
PREFIX.idx   magic, version u64, dtype code u8, sequence count u64, document count u64 (one more than there
             are), then sizes int32 [N] in tokens, pointers int64 [N] in bytes, document indices
             int64 [N+1]; little-endian. One document is one sequence here.
PREFIX.json  a CorpusInfo. It is written last and removed first, so where it stands the data is whole.

Source: the .idx layout is that of Megatron-LM, megatron/core/datasets/indexed_dataset.py.
"""

import json
import os
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np

from megatsp.data.tokenizer import Tokenizer

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
SUFFIXES = (".bin", ".idx", ".json")


@dataclass(frozen=True)
class CorpusInfo:
    """What PREFIX.json records.

    `tokens` counts every id, one eod a document included; `bytes` counts the UTF-8 text. `source` is any
    string by which the preparing program recognises its own output. `names` has one entry a document.
    """

    tokenizer: str
    tokenizer_fingerprint: str
    vocab_size: int
    eod: int
    max_token_id: int
    documents: int
    tokens: int
    bytes: int
    source: str
    names: list[str]


class IndexedDocuments:
    """Read-only view of the documents under `prefix`; tokens stay on disk, memory-mapped.

    Attributes:
        info: the CorpusInfo.
        sizes: tokens of each document, eod included, int32 [N].
        starts: position in `tokens` of each document's first token, int64 [N].
        tokens: all tokens, integer memmap [info.tokens].

    Raises:
        ValueError: a file is missing, malformed, truncated or empty, or the three do not belong together.
    """

    def __init__(self, prefix: str | Path) -> None:
        for suffix in SUFFIXES:
            if not os.path.isfile(f"{prefix}{suffix}"):
                raise ValueError(f"no data at {prefix}: {prefix}{suffix} is missing; prepare the data again")
        self.info = read_info(prefix)
        self.sizes, dtype = _read_index(f"{prefix}.idx")
        ends = np.cumsum(self.sizes, dtype=np.int64)
        self.starts = ends - self.sizes
        num_tokens = int(ends[-1])
        found_bytes = os.path.getsize(f"{prefix}.bin")
        if found_bytes != num_tokens * dtype.itemsize:
            raise ValueError(
                f"{prefix}.bin is truncated or not the one that was indexed: it has {found_bytes} bytes, its "
                f".idx describes {num_tokens * dtype.itemsize}; prepare the data again"
            )
        described = (self.info.documents, len(self.info.names), self.info.tokens)
        if described != (len(self), len(self), num_tokens):
            raise ValueError(f"{prefix}.json does not belong to {prefix}.idx; prepare the data again")
        self.tokens = np.memmap(f"{prefix}.bin", dtype=dtype, mode="r", shape=(num_tokens,))

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, document: int) -> np.ndarray:
        """Tokens of one document, its eod included, as a view [sizes[document]] of the file."""
        start = self.starts[document]
        return self.tokens[start : start + self.sizes[document]]


class IndexedWriter:
    """Writes documents one at a time; memory grows with the number of documents, not with their length.

    Use it as a context manager. Files have temporary names until the block ends without an exception; after
    an exception nothing is left behind and what stood under `prefix` still stands.

    Raises:
        ValueError: on leaving the block, if no document was added.
    """

    def __init__(self, prefix: str | Path, tokenizer: Tokenizer, source: str = "") -> None:
        self.prefix = str(prefix)
        self._tokenizer = tokenizer
        self._source = source
        self._code = 8 if tokenizer.vocab_size <= 2**16 else 4
        self._sizes: list[int] = []
        self._names: list[str] = []
        self._num_bytes = 0
        self._max_token_id = tokenizer.eod
        self._bin: BinaryIO

    def __enter__(self) -> Self:
        Path(self.prefix).parent.mkdir(parents=True, exist_ok=True)
        self._bin = open(self._temporary(".bin"), "wb")
        return self

    def add(self, name: str, ids: Sequence[int] | np.ndarray, num_bytes: int) -> None:
        """Append one document: `ids` without eod, which is added here, and the bytes of its UTF-8 text.

        Raises:
            ValueError: the document is empty, longer than 2^31 - 2 tokens, or has an id that the tokenizer
                does not have.
        """
        tokens = np.asarray(ids, dtype=np.int64)
        if tokens.size == 0 or tokens.size > 2**31 - 2:
            raise ValueError(f"document {name!r} has {tokens.size} tokens; 1 to 2^31 - 2 are possible")
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self._tokenizer.vocab_size:
            raise ValueError(
                f"document {name!r} has ids from {low} to {high}; "
                f"the {self._tokenizer.name} tokenizer has 0 to {self._tokenizer.vocab_size - 1}"
            )
        self._bin.write(np.append(tokens, self._tokenizer.eod).astype(DTYPE_OF_CODE[self._code]).tobytes())
        self._sizes.append(tokens.size + 1)
        self._names.append(name)
        self._num_bytes += num_bytes
        self._max_token_id = max(self._max_token_id, high)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with self._bin:
                if kind is None:
                    self._sync(self._bin)
            if kind is None:
                self._commit()
        finally:
            for suffix in SUFFIXES:
                Path(self._temporary(suffix)).unlink(missing_ok=True)

    def _commit(self) -> None:
        if not self._sizes:
            raise ValueError(f"nothing to write at {self.prefix}: no document was added")
        with open(self._temporary(".idx"), "wb") as file:
            sizes = np.array(self._sizes, dtype="<i4")
            ends = np.cumsum(sizes, dtype="<i8")
            itemsize = np.dtype(DTYPE_OF_CODE[self._code]).itemsize
            file.write(HEADER.pack(MAGIC, VERSION, self._code, len(sizes), len(sizes) + 1))
            file.write(sizes.tobytes())
            file.write(((ends - sizes) * itemsize).astype("<i8").tobytes())
            file.write(np.arange(len(sizes) + 1, dtype="<i8").tobytes())
            self._sync(file)
        info = CorpusInfo(
            tokenizer=self._tokenizer.name,
            tokenizer_fingerprint=self._tokenizer.fingerprint,
            vocab_size=self._tokenizer.vocab_size,
            eod=self._tokenizer.eod,
            max_token_id=self._max_token_id,
            documents=len(sizes),
            tokens=int(ends[-1]),
            bytes=self._num_bytes,
            source=self._source,
            names=self._names,
        )
        with open(self._temporary(".json"), "wb") as file:
            file.write(json.dumps(asdict(info), indent=1).encode())
            self._sync(file)
        # Without its .json a prefix holds no data, so an interruption between renames cannot mix old and new.
        Path(f"{self.prefix}.json").unlink(missing_ok=True)
        for suffix in SUFFIXES:
            os.replace(self._temporary(suffix), f"{self.prefix}{suffix}")

    def _temporary(self, suffix: str) -> str:
        return f"{self.prefix}{suffix}.{os.getpid()}.tmp"

    @staticmethod
    def _sync(file: BinaryIO) -> None:
        file.flush()
        os.fsync(file.fileno())


def read_info(prefix: str | Path) -> CorpusInfo:
    """The CorpusInfo in PREFIX.json.

    Raises:
        ValueError: the file is missing, is no JSON, or lacks or adds a key.
    """
    path = f"{prefix}.json"
    expected = {field.name for field in fields(CorpusInfo)}
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"no data at {prefix}: {path} is missing") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict) or set(content) != expected:
        raise ValueError(f"{path} must have exactly the keys {', '.join(sorted(expected))}")
    return CorpusInfo(**content)


def _read_index(path: str) -> tuple[np.ndarray, np.dtype]:
    """Sizes int32 [N] and the token dtype, of a checked .idx file."""
    content = Path(path).read_bytes()  # 20 bytes a document
    if len(content) < HEADER.size or not content.startswith(MAGIC):
        raise ValueError(f"{path} is not a Megatron index: it does not begin with {MAGIC!r}")
    _, version, code, num_sequences, num_indices = HEADER.unpack_from(content)
    if version != VERSION:
        raise ValueError(f"{path} has version {version}; only {VERSION} is known")
    if code not in DTYPE_OF_CODE:
        raise ValueError(f"{path} has dtype code {code}; integer tokens have one of {sorted(DTYPE_OF_CODE)}")
    if num_sequences == 0:
        raise ValueError(f"{path} has no documents")
    if num_indices != num_sequences + 1:
        raise ValueError(
            f"{path} has {num_sequences} sequences in {num_indices - 1} documents; a document must be one "
            "sequence: prepare the data again without splitting sentences"
        )
    expected_bytes = HEADER.size + 12 * num_sequences + 8 * num_indices
    if len(content) != expected_bytes:
        raise ValueError(
            f"{path} is truncated or damaged: it has {len(content)} bytes, {expected_bytes} expected"
        )
    dtype = np.dtype(DTYPE_OF_CODE[code])
    sizes = np.frombuffer(content, "<i4", num_sequences, HEADER.size)
    pointers = np.frombuffer(content, "<i8", num_sequences, HEADER.size + 4 * num_sequences)
    indices = np.frombuffer(content, "<i8", num_indices, HEADER.size + 12 * num_sequences)
    starts = np.cumsum(sizes, dtype=np.int64) - sizes
    if (
        (sizes < 1).any()
        or not np.array_equal(pointers, starts * dtype.itemsize)
        or not np.array_equal(indices, np.arange(num_indices))
    ):
        raise ValueError(f"{path} is damaged: its sizes, pointers and document indices contradict each other")
    return sizes, dtype
