"""How the input is cut into partitions, each of which one worker tokenises whole; and what identifies a job.

Partitions are runs of the input of about equal size, in its order. The cut depends on the input alone, not on
the number of workers, so that an interrupted job goes on with any.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from megatsp.data.preprocess.inputs import DATASET, JSONL, PARQUET, InputFile, Rows
from megatsp.data.preprocess.sources import Piece, row_group_bytes

SMALLEST_BYTES, USUAL_BYTES, MOST_PARTITIONS = 4 << 20, 128 << 20, 20_000


def partitions(inputs: Sequence[InputFile | Rows], count: int = 0) -> list[list[Piece]]:
    """The pieces of each partition.

    Args:
        count: how many; there are fewer if the input cannot be cut so often. 0: one for about 128 MB, smaller
            ones of less than 8 GB, so that workers finish together and a kill costs little.
    """
    total = sum(max(file.bytes, 1) for file in inputs)
    if not count:
        size = max(min(USUAL_BYTES, max(SMALLEST_BYTES, total // 64)), total // MOST_PARTITIONS)
        count = max(1, round(total / size))
    cut: list[list[Piece]] = [[]]
    begin, number = 0, 0
    for file in inputs:
        for piece in _pieces(file, begin, total, count):
            belongs = begin * count // total
            if belongs > number and cut[-1]:
                cut.append([])
            number = belongs
            _append(cut[-1], piece)
            begin += max(piece.bytes, 1)
    return cut


def description(
    inputs: Sequence[InputFile | Rows], options: Mapping[str, Any], cut: Sequence[Sequence[Piece]]
) -> dict[str, str]:
    """What a finished partition was made of: if one of these differs, it cannot be used.

    Args:
        options: those that the output depends on, with the tokenizer's fingerprint.
    """
    return {
        "inputs": _sha256([file.key for file in inputs]),
        "partitions": _sha256([[list(vars(piece).values()) for piece in pieces] for pieces in cut]),
        **{key: json.dumps(value) for key, value in options.items()},
    }


def source_of(job: Mapping[str, str]) -> str:
    """CorpusInfo.source: equal iff the job is, however it was cut."""
    return _sha256([(key, value) for key, value in sorted(job.items()) if key != "partitions"])


def _pieces(file: InputFile | Rows, begin: int, total: int, count: int) -> Iterator[Piece]:
    """A file in the parts that lie in different partitions."""
    if isinstance(file, Rows):
        yield from _row_pieces(file, begin, total, count)
    elif file.kind == PARQUET:
        yield from _row_group_pieces(file)
    elif file.kind == JSONL and not file.compressed and file.bytes:
        for low, high in _ranges(begin, file.bytes, total, count):
            yield Piece(JSONL, file.path, low, high, high - low)
    else:
        yield Piece(file.kind, file.path, 0, file.bytes, file.bytes)


def _row_group_pieces(file: InputFile) -> Iterator[Piece]:
    try:
        sizes = row_group_bytes(file.path)
    except ValueError:  # reading it says so again
        sizes = [1]
    done, total, low = 0, max(sum(sizes), 1), 0
    for index, num_bytes in enumerate(sizes):
        done += num_bytes
        high = file.bytes * done // total
        yield Piece(PARQUET, file.path, index, index + 1, high - low)
        low = high


def _append(pieces: list[Piece], piece: Piece) -> None:
    if (
        piece.kind == PARQUET
        and pieces
        and (last := pieces[-1]).path == piece.path
        and last.end == piece.begin
    ):
        pieces[-1] = replace(last, end=piece.end, bytes=last.bytes + piece.bytes)
    else:
        pieces.append(piece)


def _row_pieces(data: Rows, begin: int, total: int, count: int) -> Iterator[Piece]:
    num_bytes = max(data.bytes, 1)
    for low, high in _ranges(begin, num_bytes, total, count):
        first, last = data.rows * low // num_bytes, data.rows * high // num_bytes
        if first < last:
            yield Piece(DATASET, data.name, first, last, high - low)


def _ranges(begin: int, length: int, total: int, count: int) -> Iterator[tuple[int, int]]:
    """[0, length) cut where partitions end: those begin at the multiples of total / count, less `begin`."""
    low = 0
    while low < length:
        number = (begin + low) * count // total
        high = min(length, -(-(number + 1) * total // count) - begin)
        yield low, high
        low = high


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()
