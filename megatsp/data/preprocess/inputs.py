"""Which files the user's --input names, in which order, and how each is read."""

import glob
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

JSONL, PARQUET, TEXT, DATASET = "jsonl", "parquet", "text", "dataset"
TYPES = (JSONL, PARQUET, TEXT)
JSONL_SUFFIXES = (".jsonl", ".json", ".ndjson")
COMPRESSED = (".gz", ".zst")


@dataclass(frozen=True)
class InputFile:
    """A file to read. What tells whether it is still the same: path, bytes, mtime_ns."""

    path: str
    kind: str
    bytes: int
    mtime_ns: int
    inode: tuple[int, int] = field(default=(0, 0), compare=False)  # its device too

    @property
    def compressed(self) -> bool:
        """Whether it can only be read from its beginning."""
        return bool(compression(self.path))

    @property
    def key(self) -> tuple[str | int, ...]:
        """What a job remembers of it."""
        return self.path, self.kind, self.bytes, self.mtime_ns


def find(inputs: Sequence[str], input_type: str = "auto") -> list[InputFile]:
    """The files of `inputs`, which are files, folders and globs, in the order given; a folder's are sorted.

    Of a folder, files and folders whose names begin with a dot are left out, and with an input type other
    than text the files that do not look like it.

    Raises:
        ValueError: nothing there, no file of the type, a folder with data files and others, or a file twice.
    """
    files: dict[tuple[int, int], InputFile] = {}
    for given in inputs:
        for file in _found(given, input_type):
            if (before := files.setdefault(file.inode, file)) is not file:
                same = "" if before.path == file.path else f", which is the same file as {before.path},"
                raise ValueError(f"--input names {file.path}{same} twice: name each file once")
    return list(files.values())


def compression(path: str) -> str:
    """The suffix that says how a file is compressed, in lower case; nothing if it is not."""
    return next((suffix for suffix in COMPRESSED if path.lower().endswith(suffix)), "")


def kind_of(path: str) -> str:
    """What the name of a file says that it is."""
    name = path.lower().removesuffix(compression(path))
    return JSONL if name.endswith(JSONL_SUFFIXES) else PARQUET if name.endswith(".parquet") else TEXT


def _found(given: str, input_type: str) -> Iterator[InputFile]:
    if os.path.lexists(given):
        paths = [given]
    elif glob.has_magic(given):
        paths = sorted(glob.glob(given, recursive=True))
        if not paths:
            raise ValueError(f"--input {given}: no file matches")
    else:
        raise ValueError(f"--input {given}: there is no such file or folder")
    for path in paths:
        if os.path.isdir(path):
            yield from _in_folder(path, input_type)
        else:
            yield _file(path, input_type)


def _in_folder(folder: str, input_type: str) -> list[InputFile]:
    files = [_file(path, "auto") for path in _walk(folder, set())]
    if input_type in (JSONL, PARQUET):
        files = [file for file in files if file.kind == input_type]
    elif input_type == TEXT:
        files = [replace(file, kind=TEXT) for file in files]
    elif len(kinds := {file.kind for file in files}) > 1 and TEXT in kinds:
        examples = ", ".join(next(f.path for f in files if f.kind == kind) for kind in sorted(kinds))
        raise ValueError(
            f"--input {folder} holds data files and others ({examples}): name those that are meant by "
            "--input-type jsonl, parquet or text (text makes every file a document), or by a glob"
        )
    if not files:
        raise ValueError(f"--input {folder}: the folder has no {input_type.replace('auto', '')} files")
    return files


def _walk(folder: str, visited: set[tuple[int, int]]) -> Iterator[str]:
    """Its files, recursively, each folder's entries in order of their names.

    A folder that links lead to again, perhaps from inside itself, is read once.
    """
    try:
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in visited:
            return
        visited.add((status.st_dev, status.st_ino))
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise ValueError(f"--input: cannot read the folder {folder}: {error.strerror}") from None
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if os.path.isdir(entry.path):
            yield from _walk(entry.path, visited)
        else:
            yield entry.path


def _file(path: str, input_type: str) -> InputFile:
    try:
        status = os.stat(path)
    except OSError as error:
        raise ValueError(f"--input: cannot read {path}: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(
            f"--input {path} is no regular file: a run that was interrupted could not go on from it"
        )
    kind = kind_of(path) if input_type == "auto" else input_type
    return InputFile(path, kind, status.st_size, status.st_mtime_ns, (status.st_dev, status.st_ino))


def check_unchanged(files: Sequence[InputFile]) -> None:
    """Whether the files are what `find` found.

    Raises:
        ValueError: one is not, or cannot be read.
    """
    for file in files:
        now = _file(file.path, file.kind)
        if now != file:
            raise ValueError(
                f"{file.path} changed while it was read: it had {file.bytes} bytes and has {now.bytes}; "
                "nothing was written, give the command again when nothing writes to it"
            )


@dataclass(frozen=True)
class Rows:
    """A `datasets.Dataset` as an input."""

    name: str
    rows: int
    bytes: int
    fingerprint: str

    @property
    def key(self) -> tuple[str | int, ...]:
        """What a job remembers of it."""
        return self.name, self.rows, self.bytes, self.fingerprint


def load_rows(name: str, config: str | None, split: str) -> tuple[Rows, Any]:
    """A data set of the `datasets` library: a folder of save_to_disk, a folder of data files, or the hub's.

    Raises:
        ValueError: it cannot be had, has no such split, or has no rows.
    """
    import datasets

    try:
        if os.path.isdir(name) and {"state.json", "dataset_dict.json"} & set(os.listdir(name)):
            if config is not None:
                raise ValueError("a folder of save_to_disk has no --dataset-config")
            loaded = datasets.load_from_disk(name)
            if isinstance(loaded, datasets.DatasetDict):
                if split not in loaded:
                    raise ValueError(f"no split {split!r} (splits: {', '.join(map(str, loaded))})")
                loaded = loaded[split]
        else:
            loaded = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the library raises many kinds
        raise ValueError(f"--dataset {name}: {' '.join(str(error).split())[:500]}") from None
    if not len(loaded):
        raise ValueError(f"--dataset {name}: the split {split} has no rows")
    num_bytes = loaded.data.nbytes * len(loaded) // max(loaded.data.num_rows, 1)  # it may be a selection
    return Rows(f"{name}[{split}]", len(loaded), max(num_bytes, 1), loaded._fingerprint), loaded
