"""Checkpoints for tests, changed by hand as their writer might have written them."""

from pathlib import Path

from megatsp.checkpoint.manifest import (
    MANIFEST,
    SUFFIX,
    FileEntry,
    Manifest,
    TensorEntry,
    checksum,
    write_manifest,
)
from megatsp.checkpoint.storage import read_parts


def relist(folder: Path) -> Path:
    """Makes the manifest say what the files of a checkpoint now hold."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST]
    files = {
        path.relative_to(folder).as_posix(): FileEntry(path.stat().st_size, checksum(path)) for path in paths
    }
    tensors: dict[str, TensorEntry] = {}
    for file in (name for name in files if name.endswith(SUFFIX)):
        for name, part in read_parts(folder, file):
            ends = tuple(o + n for o, n in zip(part.offsets, part.entry.shape, strict=True))
            known = tensors[name].shape if name in tensors else ends
            shape = tuple(max(pair) for pair in zip(known, ends, strict=True))
            tensors[name] = TensorEntry(part.entry.dtype, shape)
    write_manifest(folder, Manifest(files, tensors))
    return folder
