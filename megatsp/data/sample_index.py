"""Where each sample of a split begins: built once, in bounded memory, kept in files, read by memory map.

What an index depends on makes its key: the sizes of the documents, the seed, the split, the packing and the
sequence length; neither the tokens nor any rank count. Each node builds it at most once: the first process
that asks holds a lock while the others wait. A finished index appears by one rename.

Where the data cannot be written beside, the index goes to a folder of this user's and this machine's.
"""

import fcntl
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np

from megatsp.data.corpus import Corpus
from megatsp.data.mapped import map_file
from megatsp.data.packing import PIECE, cut, pack
from megatsp.data.permutation import Permutation

VERSION = 1
CHUNK = 1 << 16  # documents that are looked at together while building
PATIENCE_S = 5.0  # a longer wait is said
STALE_S = 24 * 3600.0  # no build takes so long
CONCAT = np.dtype([("position", "<i8"), ("offset", "<i8")])  # of a sample's first token, in the order

Built = tuple[int, dict[str, int], dict[str, int]]  # samples, rows of each array, facts about the documents


class DocumentOrder:
    """The documents of one split in a seeded order: a range of a permutation of the corpus.

    The first documents of the permutation are validation's, the next test's, the rest training's.
    """

    def __init__(self, num_documents: int, seed: int, begin: int, end: int) -> None:
        self._permutation = Permutation(num_documents, seed, "documents")
        self.begin, self.end = begin, end

    def __len__(self) -> int:
        return self.end - self.begin

    def __call__(self, start: int, stop: int) -> np.ndarray:
        """Documents start to stop of the order, int64; 0 <= start <= stop <= len."""
        assert 0 <= start <= stop <= len(self)
        return self._permutation(np.arange(self.begin + start, self.begin + stop))

    def chunks(self) -> Iterator[np.ndarray]:
        for start in range(0, len(self), CHUNK):
            yield self(start, min(start + CHUNK, len(self)))


class SampleIndex:
    """A finished index: `num_samples`, `facts` (counts of documents), and arrays, opened when asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._meta = json.loads((folder / "meta.json").read_text())
        self.num_samples: int = self._meta["num_samples"]
        self.facts: dict[str, int] = self._meta["facts"]

    @cached_property
    def concat(self) -> np.ndarray:
        """Where samples begin, CONCAT [samples + 1]."""
        return self._map("concat", CONCAT)

    @cached_property
    def pieces(self) -> np.ndarray:
        """All pieces, sample after sample, PIECE [n]."""
        return self._map("pieces", PIECE)

    @cached_property
    def starts(self) -> np.ndarray:
        """Which piece is each sample's first, int64 [samples + 1]."""
        return self._map("starts", np.dtype("<i8"))

    def __getstate__(self) -> dict[str, Any]:
        return {
            "_folder": self._folder,
            "_meta": self._meta,
            "num_samples": self.num_samples,
            "facts": self.facts,
        }

    def _map(self, name: str, dtype: np.dtype) -> np.ndarray:
        count = self._meta["counts"][name]
        path = self._folder / name
        if path.stat().st_size != count * dtype.itemsize:
            raise ValueError(f"the sample index {self._folder} is damaged: remove it, it is built again")
        return map_file(path, dtype, count)


def open_index(
    corpus: Corpus,
    order: DocumentOrder,
    seed: int,
    seq_length: int,
    packing: str,
    long_documents: str,
    cache: str,
) -> SampleIndex:
    """The index of a split, from the cache or built.

    Args:
        cache: the folder of indices; empty: beside the data, or else a temporary one.

    Raises:
        ValueError: it cannot be written anywhere.
    """
    description = {
        "version": VERSION, "corpus": corpus.key, "documents": [corpus.num_documents, order.begin, order.end],
        "seed": seed, "seq_length": seq_length, "packing": packing,
        "long_documents": "" if packing == "concat" else long_documents,
    }  # fmt: skip
    key = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:32]
    for folder in _folders(corpus, cache):
        if _is_whole(folder / key, description):
            return SampleIndex(folder / key)

    def build(folder: Path) -> None:
        if packing == "concat":
            built = _build_concat(folder, corpus, order, seq_length)
        else:
            built = _build_packed(folder, corpus, order, seq_length, packing, long_documents)
        meta = dict(zip(("num_samples", "counts", "facts"), built, strict=True))
        (folder / "meta.json").write_text(json.dumps({**meta, "description": description}))

    with _lock(key, corpus.source):
        refusals = []
        for folder in _folders(corpus, cache):
            if _is_whole(folder / key, description):  # the process that held the lock has built it
                return SampleIndex(folder / key)
            try:
                _write(folder, key, build, corpus.source)
            except OSError as error:
                refusals.append(f"{folder}: {error.strerror}")
            else:
                return SampleIndex(folder / key)
    raise ValueError(
        f"no room for the sample index of {corpus.source} ({'; '.join(refusals)}): set data.cache to a "
        "folder that can be written to"
    )


def _folders(corpus: Corpus, cache: str) -> Iterator[Path]:
    """Where an index may be, best first; the temporary folder is touched only when it is come to."""
    if cache:
        yield Path(cache)
    else:
        yield Path(corpus.shards[0].prefix).parent / ".sample_index"
        yield _own_folder() / "sample_index"


def _own_folder() -> Path:
    """A folder in the temporary one that no other user can write to."""
    folder = Path(tempfile.gettempdir(), f"megatsp-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o022:
        raise ValueError(
            f"{folder} belongs to another user or can be written to by others: remove it, or set TMPDIR"
        )
    return folder


def _is_whole(folder: Path, description: dict[str, Any]) -> bool:
    try:
        meta = json.loads((folder / "meta.json").read_text())
        return bool(meta["description"] == description)
    except (OSError, ValueError, KeyError, TypeError):
        return False


@contextmanager
def _lock(key: str, source: str) -> Iterator[None]:
    """One process of this machine at a time; the lock goes with its process. Few files serve all keys."""
    with open(_own_folder() / f"index-{key[:1]}.lock", "a") as file:
        since, said = time.monotonic(), False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not said and time.monotonic() - since > PATIENCE_S:
                    said = True
                    print(f"waiting for another process to index {source}", file=sys.stderr, flush=True)
                time.sleep(0.05)
        yield


def _write(folder: Path, key: str, build: Callable[[Path], None], source: str) -> None:
    """Builds in a folder beside and renames it; another node may have been first."""
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("*.tmp"):  # of a process that was killed; younger ones may be another node's
        if time.time() - stale.stat().st_mtime > STALE_S:
            shutil.rmtree(stale, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{key}.", suffix=".tmp", dir=folder))
    since = time.monotonic()
    try:
        build(temporary)
        for file in temporary.iterdir():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        temporary.chmod(0o755)
        if (folder / key).exists():
            shutil.rmtree(folder / key, ignore_errors=True)  # it was not whole
        try:
            temporary.rename(folder / key)
        except OSError:
            if not (folder / key / "meta.json").is_file():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if (seconds := time.monotonic() - since) > PATIENCE_S:
        print(f"indexed {source} in {seconds:.0f} s: {folder / key}", file=sys.stderr, flush=True)


def _build_concat(folder: Path, corpus: Corpus, order: DocumentOrder, seq_length: int) -> Built:
    """Sample i is tokens i T to i T + T of the stream, and one more as its last label."""
    tokens, position, boundaries = 0, 0, 0
    with (folder / "concat").open("wb") as file:
        for documents in order.chunks():
            ends = tokens + np.cumsum(corpus.sizes(documents))
            stop = int(ends[-1])
            # Every multiple of T at which a token of this chunk stands.
            starts = np.arange(-(-tokens // seq_length) * seq_length, stop, seq_length)
            at = np.searchsorted(ends, starts, side="right")
            begins = np.concatenate([[tokens], ends[:-1]])[at]
            _append(file, CONCAT, position=position + at, offset=starts - begins)
            boundaries += len(starts)
            tokens, position = stop, position + len(documents)
    # A boundary that has no token after it ends no sample; the last one that has only ends one.
    return max(0, boundaries - 1), {"concat": boundaries}, {"documents": len(order), "tokens": tokens}


def _build_packed(
    folder: Path, corpus: Corpus, order: DocumentOrder, seq_length: int, packing: str, long_documents: str
) -> Built:
    facts = {"documents": len(order), "tokens": 0, "truncated": 0, "dropped": 0, "empty": 0, "inputs": 0}

    def chunks() -> Iterator[np.ndarray]:
        for documents in order.chunks():
            sizes = corpus.sizes(documents)
            pieces, truncated, dropped = cut(documents, sizes, seq_length, long_documents)
            facts["tokens"] += int(sizes.sum())
            facts["truncated"] += truncated
            facts["dropped"] += dropped
            facts["empty"] += int((sizes < 2).sum())
            facts["inputs"] += int(pieces["length"].sum())
            yield pieces

    total, samples = 0, 0
    with (folder / "pieces").open("wb") as pieces_file, (folder / "starts").open("wb") as starts_file:
        np.zeros(1, "<i8").tofile(starts_file)
        for pieces, counts in pack(chunks(), seq_length, packing):
            pieces.tofile(pieces_file)
            (total + np.cumsum(counts)).astype("<i8").tofile(starts_file)
            total, samples = total + len(pieces), samples + len(counts)
    return samples, {"pieces": total, "starts": samples + 1}, facts


def _append(file: IO[bytes], dtype: np.dtype, **columns: np.ndarray) -> None:
    rows = np.empty(len(next(iter(columns.values()))), dtype)
    for name, column in columns.items():
        rows[name] = column
    rows.tofile(file)
