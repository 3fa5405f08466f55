"""A checkpoint's manifest: every file with its size and checksum, every tensor with its type and shape.

It is what makes a folder a checkpoint: a file that it does not list is never read, and a folder without it is
refused. Nothing that it names may lie outside the folder.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from megatsp.checkpoint.paths import LATEST, sync

MANIFEST = "manifest.json"
FORMAT = "megatsp-checkpoint"
VERSION = 1
SUFFIX = ".safetensors"  # of the files that hold tensors
OPTIMIZER = "optimizer."  # before the names of an optimizer's tensors
_SEAL = "xxh3_128"  # the key of the manifest's own checksum, of everything else in it
_WIDTHS = {"F32": 4, "BF16": 2, "F16": 2}  # bytes of a number
_READ_BYTES = 1 << 23  # at a time
_THREADS = 4
FIX = f"restore it, or write the iteration of another checkpoint into {LATEST} beside it"


class Damaged(ValueError):
    """A checkpoint is not as it was written; another one may be whole."""


@dataclass(frozen=True)
class FileEntry:
    """A file's size in bytes and its checksum, in hexadecimal digits."""

    bytes: int
    xxh3_128: str


@dataclass(frozen=True)
class TensorEntry:
    """A whole tensor's type, as safetensors spells it (F32), and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * _WIDTHS[self.dtype]


@dataclass(frozen=True)
class Manifest:
    """Files by their path in the folder, tensors by name."""

    files: Mapping[str, FileEntry]
    tensors: Mapping[str, TensorEntry]

    @property
    def shards(self) -> list[str]:
        """The files that hold tensors."""
        return sorted(name for name in self.files if name.endswith(SUFFIX))

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(entry.bytes for entry in self.files.values())


def entry_of(content: bytes) -> FileEntry:
    """What a manifest says of a small file."""
    return FileEntry(len(content), xxhash.xxh3_128_hexdigest(content))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        Damaged: it is missing or cut off.
        ValueError: it is of a later version of megatsp, or lists a file outside the folder.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        what = "is not there" if not folder.is_dir() else f"has no {MANIFEST}, so it is no whole checkpoint"
        raise Damaged(f"{folder} {what}; {FIX}") from None
    except OSError as error:
        raise Damaged(f"{folder} is damaged: cannot read {MANIFEST}: {error.strerror}; {FIX}") from error
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{folder} is damaged: {MANIFEST} is no JSON: {error}; {FIX}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise Damaged(f"{folder} is damaged: {MANIFEST} is none of {FORMAT}; {FIX}")
    seal, version = content.pop(_SEAL, None), content.get("version")
    if type(version) is int and version > VERSION:  # before the seal, which may be another by then
        raise ValueError(
            f"{folder} is of version {version} of our checkpoints; this megatsp reads version {VERSION}: "
            "update megatsp"
        )
    if seal is not None and seal != _seal(content):
        raise Damaged(f"{folder} is damaged: {MANIFEST} is not what was written, by its own checksum; {FIX}")
    try:
        if version != VERSION or seal is None:
            raise ValueError(f"version {version!r}" if seal else f"no {_SEAL}")
        files = {name: _file(value) for name, value in content["files"].items()}
        tensors = {name: _tensor(value) for name, value in content["tensors"].items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__} {error}"
        raise Damaged(f"{folder} is damaged: {MANIFEST} is not laid out as one: {reason}; {FIX}") from error
    for name in files:
        _check_name(folder, name)
    return Manifest(files, tensors)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes it, and brings it to the disk; everything that it lists is there already."""
    (folder / MANIFEST).write_text(sealed({"format": FORMAT, "version": VERSION, **asdict(manifest)}))
    sync(folder / MANIFEST)


def sealed(content: Mapping[str, Any]) -> str:
    """A manifest's text, with the checksum of what it says."""
    return json.dumps({**content, _SEAL: _seal(content)}, indent=1) + "\n"


def _seal(content: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())


def size_problems(folder: Path, manifest: Manifest) -> list[str]:
    """What is missing or of another size than it was written with, one line each."""
    problems = []
    for name, entry in manifest.files.items():
        try:
            size = (folder / name).stat().st_size
        except OSError as error:
            missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
            found = "is missing" if missing else f"cannot be read: {error.strerror}"
        else:
            found = f"has {size} bytes" if size != entry.bytes else ""
        if found:
            problems.append(f"{name}, of {entry.bytes} bytes, {found}")
    return problems


def sum_problems(folder: Path, manifest: Manifest, names: Iterable[str] | None = None) -> list[str]:
    """Which of these files (None: all) hold something else than what was written, one line each.

    They are read through, several at a time; what cannot be read is a problem too.
    """
    chosen = list(manifest.files) if names is None else list(names)

    def problem(name: str) -> str:
        wanted = manifest.files[name].xxh3_128
        try:
            found = checksum(folder / name)
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        return "" if found == wanted else f"{name} has checksum {found}, and was written with {wanted}"

    if len(chosen) < 2:
        return [line for line in map(problem, chosen) if line]
    with ThreadPoolExecutor(_THREADS) as pool:
        return [line for line in pool.map(problem, chosen) if line]


def check_files(folder: Path, verify: str = "checksums") -> Manifest:
    """The manifest of a checkpoint whose files are found to be whole, by one process.

    verify: sizes, or checksums too, for which every file is read through.

    Raises:
        Damaged: a file is missing, or is not what was written.
        ValueError: see `read_manifest`.
    """
    manifest = read_manifest(folder)
    problems = size_problems(folder, manifest)
    if not problems and verify == "checksums":
        problems = sum_problems(folder, manifest)
    raise_damage(folder, problems)
    return manifest


def check_folder(folder: Path) -> Manifest:
    """The manifest of a checkpoint that is checked as far as takes no time: sizes, and small files' sums.

    Raises:
        Damaged: a file is missing, has another size or, of the small ones, another checksum.
        ValueError: see `read_manifest`.
    """
    manifest = read_manifest(folder)
    problems = size_problems(folder, manifest)
    small = [name for name in manifest.files if not name.endswith(SUFFIX)]
    raise_damage(folder, problems or sum_problems(folder, manifest, small))
    return manifest


def raise_damage(folder: Path, problems: list[str]) -> None:
    """Says what is wrong with a checkpoint, if anything is.

    Raises:
        Damaged: there are problems; the first of them are in its text.
    """
    if problems:
        more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise Damaged(f"{folder} is damaged: {'; '.join(problems[:4])}{more}; {FIX}")


def checksum(path: Path) -> str:
    """The xxh3_128 of a file.

    Raises:
        OSError: it cannot be read.
    """
    digest = xxhash.xxh3_128()
    buffer = memoryview(bytearray(_READ_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def _file(value: Mapping[str, Any]) -> FileEntry:
    size, digest = value["bytes"], value["xxh3_128"]
    if type(size) is not int or size < 0 or type(digest) is not str:
        raise ValueError(f"a file of {size!r} bytes, checksum {digest!r}")
    return FileEntry(size, digest)


def _tensor(value: Mapping[str, Any]) -> TensorEntry:
    dtype, shape = value["dtype"], tuple(value["shape"])
    if type(dtype) is not str or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"a tensor of type {dtype!r}, shape {shape!r}")
    if math.prod(shape) >= 1 << 63:
        raise ValueError(f"a tensor of shape {shape!r}")
    return TensorEntry(dtype, shape)


def _check_name(folder: Path, name: str) -> None:
    """Refuses a name that is no plain path below the folder, or is a link to what lies outside."""
    parts = PurePosixPath(name).parts
    plain = bool(parts) and "/".join(parts) == name and name.isprintable() and "\\" not in name
    if not plain or name.startswith("/") or ".." in parts or name == MANIFEST:
        raise ValueError(
            f"{folder / MANIFEST} lists {name!r}, which is no plain name of a file in that folder: do not "
            "use this checkpoint, unless you know who wrote it and why"
        )
    inside, target = os.path.realpath(folder), os.path.realpath(folder / name)
    if os.path.commonpath([inside, target]) != inside:
        raise ValueError(
            f"{folder / name} is a link to {target}, outside the checkpoint: put the file itself there if "
            "you trust it"
        )
