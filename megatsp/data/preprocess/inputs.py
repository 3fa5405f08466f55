"""Which files the user's --input names, in which order, and how each is read."""

import glob
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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

    def check(self) -> None:
        """Checks that the file is still what it was.

        Raises:
            ValueError: it has changed, or is gone.
        """
        if _file(self.path, self.kind) != self:
            raise ValueError(
                f"{self.path} changed while it was read: wait until it is whole, and begin again"
            )


def find(inputs: Sequence[str], input_type: str = "auto") -> list[InputFile]:
    """The files of `inputs`, which are files, folders and globs, in the order given; a folder's are sorted.

    Of a folder, files and folders whose names begin with a dot are left out, and with an input type other
    than text the files that do not look like it.

    Raises:
        ValueError: nothing there, no file of the type, or a folder with data files and others.
    """
    files = [file for given in inputs for file in _found(given, input_type)]
    seen: dict[tuple[int, int], str] = {}
    for file in files:
        status = os.stat(file.path)
        other = seen.setdefault((status.st_dev, status.st_ino), file.path)
        if other is not file.path:
            raise ValueError(
                f"--input names a file twice: {other} and {file.path}; its documents would be doubled"
            )
    return files


def compression(path: str) -> str:
    """The suffix that says how a file is compressed, and so only read from its beginning; "" if it is not."""
    return next((suffix for suffix in COMPRESSED if path.lower().endswith(suffix)), "")


def kind_of(path: str) -> str:
    """What the name of a file says that it is."""
    name = path.lower()
    for suffix in COMPRESSED:
        name = name.removesuffix(suffix)
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
    files = [_file(path, "auto") for path in _walk(folder)]
    if input_type in (JSONL, PARQUET):
        files = [file for file in files if file.kind == input_type]
    elif input_type == TEXT:
        files = [InputFile(file.path, TEXT, file.bytes, file.mtime_ns) for file in files]
    elif len(kinds := {file.kind for file in files}) > 1 and TEXT in kinds:
        examples = ", ".join(next(f.path for f in files if f.kind == kind) for kind in sorted(kinds))
        raise ValueError(
            f"--input {folder} holds data files and others ({examples}): name those that are meant by "
            "--input-type jsonl, parquet or text (text makes every file a document), or by a glob"
        )
    if not files:
        raise ValueError(f"--input {folder}: the folder has no {input_type.replace('auto', '')} files")
    return files


def _walk(folder: str, above: tuple[tuple[int, int], ...] = ()) -> Iterator[str]:
    """Its files, recursively, each folder's entries in order of their names.

    above: the folders that it lies in; a link back to one of them is not followed.
    """
    try:
        status = os.stat(folder)
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise ValueError(f"--input: cannot read the folder {folder}: {error.strerror}") from None
    own = status.st_dev, status.st_ino
    if own in above:
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if os.path.isdir(entry.path):
            yield from _walk(entry.path, (*above, own))
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
    return InputFile(path, kind, status.st_size, status.st_mtime_ns)


@dataclass(frozen=True)
class Rows:
    """A `datasets.Dataset` as an input."""

    name: str
    rows: int
    bytes: int
    fingerprint: str


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
