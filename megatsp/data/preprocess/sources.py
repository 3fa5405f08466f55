"""Pieces of inputs to records: what is read, and what about it is bad.

A reader yields `(number, content)` for each record of a piece: the number is that of the line or row, from 1;
the content is a dict, a text for text files, or a Bad. It holds a record or a batch of about a megabyte.
"""

import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from megatsp.data.preprocess.inputs import DATASET, JSONL, PARQUET, TEXT, compression, find
from megatsp.nearest import did_you_mean

BATCH_BYTES = 1 << 20
MAX_DOCUMENT_BYTES = 1 << 22  # a byte-level BPE of tokenizers needs 140 times as much memory
NO_LIMIT_BYTES = 1 << 40
UNREADABLE = "unreadable file"


@dataclass(frozen=True)
class Piece:
    """A part of an input that is read at one go.

    begin, end: bytes of a JSONL file (lines that begin there are meant), row groups of Parquet, rows of a
    data set. A compressed file and a text file are one piece.
    """

    kind: str
    path: str
    begin: int
    end: int
    bytes: int  # of the input, for the progress


@dataclass(frozen=True)
class Bad:
    """What is wrong with a record, or with all that follows it in its piece."""

    reason: str  # few different ones, to be counted
    detail: str = ""


@dataclass
class Position:
    """How many bytes of a piece have been read."""

    bytes: int = 0


Record = tuple[int, "dict[str, Any] | str | Bad"]


def records(
    piece: Piece,
    keys: Sequence[str],
    max_document_bytes: int,
    position: Position,
    dataset: Any = None,
    need_all: bool = True,
) -> Iterator[Record]:
    """The records of a piece.

    Args:
        keys: columns to read; of those that a table lacks it is not silent if `need_all`.
        position: is moved on.
        dataset: the `datasets.Dataset` that the piece is of.
    """
    if piece.kind == JSONL:
        reader = _jsonl(piece, max_document_bytes, position)
    elif piece.kind == PARQUET:
        reader = _parquet(piece, keys, need_all, position)
    elif piece.kind == TEXT:
        reader = _text(piece, max_document_bytes)
    else:
        assert piece.kind == DATASET
        reader = _dataset(piece, keys, need_all, dataset, position)
    number = 0
    try:
        for number, content in reader:
            yield number, content
    except EOFError:
        yield number, Bad("truncated file", "the compressed data ends after it")
    except (OSError, zlib.error) as error:
        yield number, Bad(UNREADABLE, _said(error))
    position.bytes = piece.bytes


def texts_of(
    content: dict[str, Any] | str | Bad, keys: Sequence[str], max_document_bytes: int
) -> "list[str] | Bad":
    """The text under each key, or what is wrong with one of them."""
    if isinstance(content, Bad):
        return content
    if isinstance(content, str):
        found = [content]
    else:
        found = []
        for key in keys:
            if key not in content:
                return Bad(
                    f"missing key {key}", f"the record has {_listed(content)}{did_you_mean(key, content)}"
                )
            value = content[key]
            if not isinstance(value, str):
                return Bad(f"{key} is no text", f"it is {_json_type(value)}")
            found.append(value)
    for text in found:
        if not text:
            return Bad("empty document")
        if len(text) * 4 > max_document_bytes or not text.isascii():
            try:
                num_bytes = len(text) if text.isascii() else len(text.encode())
            except UnicodeEncodeError as error:
                return Bad("lone surrogate", f"U+{ord(text[error.start]):04X} at character {error.start}")
            if num_bytes > max_document_bytes:
                return too_long(num_bytes, max_document_bytes)
    return found


def place(piece: Piece, number: int) -> str:
    """Where a record is, for a message. Of a JSONL piece this counts the lines before it."""
    if piece.kind == TEXT or not number:
        return piece.path
    if piece.kind != JSONL:
        return f"{piece.path} row {number}"
    return f"{piece.path} line {number + _lines_before(piece)}"


def texts(
    inputs: list[str], json_keys: list[str], on_error: str = "fail", input_type: str = "auto"
) -> Iterator[str]:
    """All texts of files, folders and globs, in order: what a tokenizer is trained on.

    Raises:
        ValueError: nothing there, or a bad record, unless `on_error` is "skip".
    """
    for file in find(inputs, input_type):
        end = num_row_groups(file.path) if file.kind == PARQUET else file.bytes
        piece = Piece(file.kind, file.path, 0, end, file.bytes)
        for number, content in records(piece, json_keys, NO_LIMIT_BYTES, Position()):
            found = texts_of(content, json_keys, NO_LIMIT_BYTES)
            if isinstance(found, list):
                yield from found
            elif on_error == "fail":
                raise ValueError(message(piece, number, found))


def message(piece: Piece, number: int, bad: Bad) -> str:
    """Place, reason and detail."""
    return f"{place(piece, number)}: {bad.reason}{f': {bad.detail}' if bad.detail else ''}"


def row_group_bytes(path: str) -> list[int]:
    """Compressed bytes of each row group of a Parquet file.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        with _parquet_file(path) as file:
            groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
            return [sum(g.column(c).total_compressed_size for c in range(g.num_columns)) for g in groups]
    except OSError as error:
        raise ValueError(f"{path}: {UNREADABLE}: {_said(error)}") from None


def num_row_groups(path: str) -> int:
    """Of a Parquet file; 1 of one that cannot be read, which its reader reports."""
    try:
        return len(row_group_bytes(path))
    except ValueError:
        return 1


@contextmanager
def open_input(path: str) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """A file to read, decompressed by its suffix, and the file below whose position tells the progress."""
    with open(path, "rb", buffering=0) as raw:
        suffix = compression(path)
        if suffix and not os.fstat(raw.fileno()).st_size:  # as a download that failed leaves it
            raise EOFError("the file is empty")
        if suffix == ".gz":
            with gzip.GzipFile(fileobj=raw, mode="rb") as file:
                yield cast(BinaryIO, file), raw
        elif suffix == ".zst":
            yield io.BufferedReader(_ZstdFile(raw), 1 << 17), raw
        else:
            yield io.BufferedReader(raw, 1 << 17), raw


def _jsonl(piece: Piece, max_document_bytes: int, position: Position) -> Iterator[Record]:
    longest = 6 * max_document_bytes + BATCH_BYTES  # \u0000 for each byte, and the other keys
    compressed = bool(compression(piece.path))
    with open_input(piece.path) as (file, raw):
        at = piece.begin
        if at:  # the line that holds the byte before belongs to the piece before, unless it ends there
            file.seek(at - 1)
            at += _skip_line(file) - 1
        number = 0
        while compressed or at < piece.end:
            line = file.readline(longest)
            if not line:
                if not compressed:
                    raise ValueError(
                        f"{piece.path} ended at byte {at} of {piece.end}: it changed while it was read; wait "
                        "until it is whole, and begin again"
                    )
                break
            number += 1
            at += len(line)
            if len(line) == longest and not line.endswith(b"\n"):
                skipped = _skip_line(file)
                at += skipped
                yield (
                    number,
                    Bad(
                        f"longer than --max-document-bytes {max_document_bytes}",
                        f"a line of {longest + skipped} bytes",
                    ),
                )
                continue
            position.bytes = raw.tell() if compressed else at - piece.begin
            if number == 1 and piece.begin == 0:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.isspace():
                yield number, _parsed(line)


def _parsed(line: bytes) -> dict[str, Any] | Bad:
    if line.strip() == b"[":
        return Bad("no JSON object", "a JSON array; what is read is one object a line")
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Bad("bad UTF-8", f"byte 0x{line[error.start]:02X} at byte {error.start} of the line")
    except (ValueError, RecursionError) as error:
        return Bad("broken JSON", str(error))
    return record if isinstance(record, dict) else Bad("no JSON object", f"it is {_json_type(record)}")


def _text(piece: Piece, max_document_bytes: int) -> Iterator[Record]:
    with open_input(piece.path) as (file, _):
        content = bytearray()
        # One read of so many bytes would claim them all.
        for part in iter(lambda: file.read(BATCH_BYTES), b""):
            content += part
            if len(content) > max_document_bytes:
                break
    if len(content) > max_document_bytes:
        size = "" if compression(piece.path) else f"{piece.bytes} bytes"
        yield 1, Bad(f"longer than --max-document-bytes {max_document_bytes}", size)
        return
    content = content.removeprefix(b"\xef\xbb\xbf")
    try:
        yield 1, content.decode("utf-8")
    except UnicodeDecodeError as error:
        yield 1, Bad("bad UTF-8", f"byte 0x{content[error.start]:02X} at byte {error.start}")


def _parquet(piece: Piece, keys: Sequence[str], need_all: bool, position: Position) -> Iterator[Record]:
    import pyarrow

    with _parquet_file(piece.path) as file:
        columns = _columns(file.schema_arrow.names, keys, need_all)
        if isinstance(columns, Bad):
            yield 0, columns
            return
        groups = [file.metadata.row_group(i) for i in range(piece.end)]
        number = sum(group.num_rows for group in groups[: piece.begin])
        for index in range(piece.begin, piece.end):
            rows = groups[index].num_rows
            begin = number
            batches = file.iter_batches(
                batch_size=_batch_rows(groups[index].total_byte_size, rows),
                row_groups=[index],
                columns=columns,
                use_threads=False,
            )
            try:
                for batch in batches:
                    for record in _rows(batch):
                        number += 1
                        yield number, record
                    share = (index - piece.begin + (number - begin) / max(rows, 1)) / (
                        piece.end - piece.begin
                    )
                    position.bytes = int(piece.bytes * share)
            except (
                OSError,
                pyarrow.ArrowException,
            ) as error:  # the group's other rows; other groups can be whole
                yield (
                    number + 1,
                    Bad("unreadable rows", f"rows {number + 1} to {begin + rows}: {_said(error)}"),
                )
                number = begin + rows


def _dataset(
    piece: Piece, keys: Sequence[str], need_all: bool, dataset: Any, position: Position
) -> Iterator[Record]:
    columns = _columns(dataset.column_names, keys, need_all)
    if isinstance(columns, Bad):
        yield 0, columns
        return
    selected = dataset.select_columns(columns).with_format("arrow")
    step = _batch_rows(piece.bytes, piece.end - piece.begin)
    for begin in range(piece.begin, piece.end, step):
        end = min(begin + step, piece.end)
        yield from enumerate(_rows(selected[begin:end]), begin + 1)
        position.bytes = piece.bytes * (end - piece.begin) // (piece.end - piece.begin)


def _rows(table: Any) -> Iterator[dict[str, Any] | Bad]:
    """The rows of a pyarrow table or batch; one by one if some are no UTF-8, so that these alone are bad."""
    try:
        yield from table.to_pylist()
        return
    except UnicodeDecodeError:
        pass
    for row in range(table.num_rows):
        try:
            yield table.slice(row, 1).to_pylist()[0]
        except UnicodeDecodeError as error:
            yield Bad("bad UTF-8", f"byte 0x{error.object[error.start]:02X} at byte {error.start}")


def _batch_rows(num_bytes: int, rows: int) -> int:
    return max(1, min(1024, BATCH_BYTES * rows // max(num_bytes, 1)))


def _columns(present: Sequence[str], keys: Sequence[str], need_all: bool) -> list[str] | Bad:
    found = [key for key in keys if key in present]
    if found and (len(found) == len(keys) or not need_all):
        return found
    lacking = next(key for key in keys if key not in present)
    return Bad(f"no column {lacking}", f"its columns are {_listed(present)}{did_you_mean(lacking, present)}")


def too_long(num_bytes: int, max_document_bytes: int) -> Bad:
    """A document of so many bytes is refused."""
    return Bad(f"longer than --max-document-bytes {max_document_bytes}", f"{num_bytes} bytes")


def _skip_line(file: BinaryIO) -> int:
    """Reads to the end of a line and returns how many bytes that was."""
    skipped = 0
    while part := file.readline(1 << 20):
        skipped += len(part)
        if part.endswith(b"\n"):
            break
    return skipped


def _lines_before(piece: Piece) -> int:
    """Lines that end before a piece's first one."""
    if not piece.begin:
        return 0
    with open(piece.path, "rb") as file:
        file.seek(piece.begin - 1)
        begin = piece.begin - 1 + _skip_line(file)
        file.seek(0)
        lines = 0
        while begin:
            part = file.read(min(begin, 1 << 20))
            lines += part.count(b"\n")
            begin -= len(part)
    return lines


def _listed(names: Sequence[str] | dict[str, Any]) -> str:
    shown = ", ".join(list(map(str, names))[:20])
    return f"{shown} and {len(names) - 20} more" if len(names) > 20 else shown or "none"


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def _said(error: Exception) -> str:
    return getattr(error, "strerror", None) or " ".join(str(error).split())[:300]


@contextmanager
def _parquet_file(path: str) -> Iterator[Any]:
    """A pyarrow ParquetFile, whose errors become OSErrors."""
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path, pre_buffer=False) as file:
            yield file
    except pyarrow.ArrowException as error:
        raise OSError(_said(error)) from None


class _ZstdFile(io.RawIOBase):
    """The content of a .zst; unlike the library's reader it tells a truncated file from a whole one."""

    def __init__(self, raw: BinaryIO) -> None:
        import zstandard

        self._raw, self._library = raw, zstandard
        self._frame = self._decompressor().decompressobj()
        self._input, self._output = b"", memoryview(b"")
        self._begun = False  # whether the frame at hand has begun: a file ends between frames

    def _decompressor(self) -> Any:
        return self._library.ZstdDecompressor(max_window_size=1 << 31)  # of zstd --long=31 too

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
                raise OSError(_said(error)) from None
            self._input = b""
            if self._frame.eof:
                self._input, self._begun = self._frame.unused_data, False
                self._frame = self._decompressor().decompressobj()
        count = min(len(buffer), len(self._output))
        buffer[:count], self._output = self._output[:count], self._output[count:]
        return count
