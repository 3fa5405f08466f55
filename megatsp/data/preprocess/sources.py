"""Pieces of inputs to records: what is read, and what about it is bad.

A reader yields `(number, content)` for each record of a piece: the number is that of the line or row, from 1;
the content is a dict, a text for text files, or a Bad. It holds a record or a batch of about a megabyte.
"""

import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO

from megatsp.data.preprocess.compressed import open_input
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

    Raises:
        ValueError: the file is shorter than the piece: it was changed meanwhile.
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
        yield number, Bad("truncated file", f"the compressed data ends {'after it' if number else 'at once'}")
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
    """Where a record is, for a message; 0 is no record. Of a JSONL piece this counts the lines before it."""
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
                    raise _changed(piece, f"the file ended at byte {min(at, os.stat(piece.path).st_size)}")
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
                        _array(number, piece, line) or f"a line of {longest + skipped} bytes",
                    ),
                )
                continue
            position.bytes = raw.tell() if compressed else at - piece.begin
            if number == 1 and piece.begin == 0:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.isspace():
                record = _parsed(line)
                if isinstance(record, Bad) and (array := _array(number, piece, line)):
                    record = Bad("no JSON object", array)
                yield number, record


def _array(number: int, piece: Piece, line: bytes) -> str:
    """Says that a file is one JSON array, if its first line looks like it."""
    is_first = number == 1 and piece.begin == 0
    begin = line[:100].removeprefix(b"\xef\xbb\xbf").lstrip()
    return "a JSON array; one object a line is read" if is_first and begin.startswith(b"[") else ""


def _changed(piece: Piece, what: str) -> ValueError:
    """No record is bad, so that it is never skipped: what was read is not the input that the job is of."""
    return ValueError(f"{piece.path}: {what} of {piece.end}: it changed while it was read")


def _parsed(line: bytes) -> dict[str, Any] | Bad:
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
        for part in iter(
            lambda: file.read(BATCH_BYTES), b""
        ):  # one read of so many bytes would claim them all
            content += part
            if len(content) > max_document_bytes:
                break
    if len(content) > max_document_bytes:
        said = "when decompressed" if compression(piece.path) else f"{piece.bytes} bytes"
        yield 1, Bad(f"longer than --max-document-bytes {max_document_bytes}", said)
        return
    try:
        yield 1, content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        yield 1, Bad("bad UTF-8", f"byte 0x{content[error.start]:02X} at byte {error.start}")


def _parquet(piece: Piece, keys: Sequence[str], need_all: bool, position: Position) -> Iterator[Record]:
    import pyarrow

    with _parquet_file(piece.path) as file:
        columns = _columns(file.schema_arrow.names, keys, need_all)
        if isinstance(columns, Bad):
            if not piece.begin:  # it counts once, however the file is cut
                yield 0, columns
            return
        if file.metadata.num_row_groups < piece.end:
            raise _changed(piece, f"the file has {file.metadata.num_row_groups} row groups")
        groups = [file.metadata.row_group(i) for i in range(piece.end)]
        number = sum(group.num_rows for group in groups[: piece.begin])
        for index in range(piece.begin, piece.end):
            rows = groups[index].num_rows
            begin, end = number, number + rows
            batches = file.iter_batches(
                batch_size=_batch_rows(groups[index].total_byte_size, rows),
                row_groups=[index],
                columns=columns,
                use_threads=False,
            )
            while True:
                try:
                    batch = next(batches, None)
                except (OSError, pyarrow.ArrowException) as error:  # the other row groups may be whole
                    yield (
                        0,
                        Bad("unreadable rows", f"rows {number + 1} to {end} cannot be read: {_said(error)}"),
                    )
                    number = end
                    break
                if batch is None:
                    break
                for content in _rows(partial(_of_batch, batch), 0, len(batch)):
                    number += 1
                    yield number, content
                share = (index - piece.begin + (number - begin) / max(rows, 1)) / (piece.end - piece.begin)
                position.bytes = int(piece.bytes * share)


def _rows(
    read: Callable[[int, int], list[dict[str, Any]]], begin: int, end: int
) -> Iterator[dict[str, Any] | Bad]:
    """What `read` gives for a batch of rows; if that fails, for one row at a time."""
    import pyarrow

    wrong = (OSError, ValueError, OverflowError, pyarrow.ArrowException)  # of an Arrow value to Python's
    try:
        yield from read(begin, end)
        return
    except wrong:
        pass
    for row in range(begin, end):
        try:
            content: dict[str, Any] | Bad = read(row, row + 1)[0]
        except UnicodeDecodeError as error:
            content = Bad(
                "bad UTF-8", f"byte 0x{error.object[error.start]:02X} at byte {error.start} of a text"
            )
        except wrong as error:
            content = Bad("unreadable row", _said(error))
        yield content


def _dataset(
    piece: Piece, keys: Sequence[str], need_all: bool, dataset: Any, position: Position
) -> Iterator[Record]:
    columns = _columns(dataset.column_names, keys, need_all)
    if isinstance(columns, Bad):
        if not piece.begin:
            yield 0, columns
        return
    selected = dataset.select_columns(columns).with_format(None)
    step = _batch_rows(piece.bytes, piece.end - piece.begin)
    for begin in range(piece.begin, piece.end, step):
        end = min(begin + step, piece.end)
        yield from enumerate(_rows(partial(_of_dataset, selected), begin, end), begin + 1)
        position.bytes = piece.bytes * (end - piece.begin) // (piece.end - piece.begin)


def _of_batch(batch: Any, begin: int, end: int) -> list[dict[str, Any]]:
    return list(batch.slice(begin, end - begin).to_pylist())


def _of_dataset(selected: Any, begin: int, end: int) -> list[dict[str, Any]]:
    columns = selected[begin:end]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


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
