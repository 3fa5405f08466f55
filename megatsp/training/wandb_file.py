"""What W&B's own file of a run holds: a LevelDB log of protobuf records, read without W&B's service.

After a header of 7 bytes (":W&B", 0xBEE1, a version) come blocks of 32 KiB with fragments of records: crc32
of type and content, length, type (1: whole, 2: first, 3: middle, 4: last), content.
"""

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

_BLOCK = 32768
_MAGIC, _HEADER_BYTES = b":W&B", 7
_FRAGMENT = struct.Struct("<IHB")  # crc32, bytes of content, type
_WHOLE, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4
_WINDOW = 64 * _BLOCK


def records(log: bytes, is_start: bool = True) -> Iterator[bytes]:
    """The records of a log, up to where it is torn or damaged; none, if it is none of W&B's.

    is_start: `log` begins with the file; else with one of its blocks: what began before that is left out.
    """
    if is_start and log[: len(_MAGIC)] != _MAGIC:
        return
    at, begun = (_HEADER_BYTES if is_start else 0), None
    while at + _FRAGMENT.size <= len(log):
        if (left := _BLOCK - at % _BLOCK) < _FRAGMENT.size:
            at += left
            continue
        crc, size, kind = _FRAGMENT.unpack_from(log, at)
        content = log[at + _FRAGMENT.size : at + _FRAGMENT.size + size]
        whole = len(content) == size and _FRAGMENT.size + size <= left
        if not whole or zlib.crc32(content, zlib.crc32(bytes([kind]))) != crc:
            return
        at += _FRAGMENT.size + size
        if kind in (_WHOLE, _FIRST):
            begun = content
        elif begun is not None:
            begun += content
        if kind in (_WHOLE, _LAST) and begun is not None:
            yield begun
            begun = None


def last_step(path: Path) -> int:
    """The largest step of the rows in a .wandb file, -1 if it has none; steps only grow in it.

    Reads from the file's end, twice as much each time, since a long run's has gigabytes.
    """
    size, length = path.stat().st_size, _WINDOW
    with path.open("rb") as file:
        while True:
            start = max(0, (size - length) // _BLOCK * _BLOCK)
            file.seek(start)
            found = max(map(_step, records(file.read(size - start), is_start=start == 0)), default=-1)
            if found >= 0 or start == 0:
                return found
            length *= 2


def _step(record: bytes) -> int:
    """Of a row; -1 for another record, or what is none."""
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from wandb.proto import wandb_internal_pb2

    parsed = wandb_internal_pb2.Record()  # type: ignore[attr-defined]  # generated
    try:
        parsed.ParseFromString(record)
    except DecodeError:
        return -1
    return parsed.history.step.num if parsed.WhichOneof("record_type") == "history" else -1
