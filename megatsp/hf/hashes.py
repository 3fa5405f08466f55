"""SHA-256 of files, where it is known what it should be: in a Hugging Face cache, or beside our exports."""

import hashlib
import os
import re
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

MANIFEST = "SHA256SUMS"  # lines "<hex>  <name>", as sha256sum writes them and `sha256sum -c` reads them
_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")
_PIECE = 1 << 22
_QUIET_BYTES = 1 << 30  # less takes no time that needs a bar


def expected_hashes(folder: Path, files: Iterable[Path]) -> dict[Path, str]:
    """What is known of the files, and of all that the folder's manifest lists: from there, or from the names
    of a cache's blobs.

    Raises:
        ValueError: the manifest cannot be read, or lists a file that is missing.
    """
    listed = read_manifest(folder)
    if missing := [name for name in listed if not (folder / name).is_file()]:
        raise ValueError(
            f"{folder / MANIFEST} lists {', '.join(missing[:8])}, which is not there: restore it, or remove "
            f"{MANIFEST} to go without"
        )
    found = {folder / name: listed[name] for name in listed}
    for path in files:
        blob = path.resolve().name  # in the hub's cache a large file is a link to a blob named by its hash
        if path not in found and path.is_symlink() and re.fullmatch(r"[0-9a-f]{64}", blob):
            found[path] = blob
    return found


def read_manifest(folder: Path) -> dict[str, str]:
    """Hashes by file name; empty without a manifest.

    Raises:
        ValueError: it cannot be read.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}; restore it, or remove it to go without") from None
    found = {}
    for number, line in enumerate(lines, 1):
        match = _LINE.fullmatch(line)
        if match is None:
            raise ValueError(
                f"line {number} of {path} is not a hash, two spaces and a name: restore it, or remove it to "
                "go without"
            )
        found[match[2]] = match[1]
    return found


def check_hashes(expected: Mapping[Path, str]) -> None:
    """Reads the files, on several threads, and compares.

    Raises:
        ValueError: lists the files that are not what they were.
    """
    wrong = [path for path, found in hashes(expected).items() if found != expected[path]]
    if wrong:
        shown = "; ".join(
            f"{path}: sha256 should be {expected[path][:12]}... and is not" for path in wrong[:8]
        )
        count = f"{len(wrong)} damaged file{'s' if len(wrong) > 1 else ''}"
        raise ValueError(
            f"{count}: {shown}; download or copy again (after a change on purpose remove {MANIFEST})"
        )


def hashes(files: Iterable[Path]) -> dict[Path, str]:
    """SHA-256 of each file, in hex."""
    paths = list(files)
    total = sum(path.stat().st_size for path in paths)
    quiet = total < _QUIET_BYTES or not sys.stderr.isatty()
    with (
        tqdm(total=total, unit="B", unit_scale=True, desc="checking hashes", disable=quiet) as bar,
        ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool,
    ):
        return dict(zip(paths, pool.map(lambda path: _hash(path, bar), paths), strict=True))


def _hash(path: Path, bar: tqdm) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
            bar.update(len(piece))
    return digest.hexdigest()
