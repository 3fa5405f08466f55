"""Tokenised documents on disk: Megatron's .bin/.idx pair, and beside it what Megatron does not record.

PREFIX.bin     the tokens of all documents, one after the other
PREFIX.idx     where each document is in it: see index_file.py
PREFIX.roles   only of data that says who speaks: uint8, one a token of the .bin: 0 not the assistant's,
               1 the assistant's in an earlier turn, 2 the assistant's in its last turn
PREFIX.inputs  a line an input: its first document, a tab, its path
PREFIX.json    a CorpusInfo. It is written last and removed first, so where it stands the data is whole.

A pair without the others, as Megatron writes it, is read as it is.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from megatsp.data import token_files
from megatsp.data.index_file import Index, token_code, write_index
from megatsp.data.mapped import map_file
from megatsp.data.token_files import Counts, PathOf, TokenFiles
from megatsp.data.tokenizer import Tokenizer

SUFFIXES = (".bin", ".idx", ".roles", ".inputs", ".json")


@dataclass(frozen=True)
class CorpusInfo:
    """What PREFIX.json records; it may hold more.

    `tokens` counts every id, eod included; `bytes` counts the UTF-8 text. `source` is any string by which the
    preparing program recognises its own output. `rejects` counts left-out records by reason.
    """

    tokenizer: str
    tokenizer_fingerprint: str
    vocab_size: int
    eod: int
    max_token_id: int
    documents: int
    tokens: int
    bytes: int
    source: str
    sizes_sha256: str
    has_roles: bool
    rejects: dict[str, int] = field(default_factory=dict)


class IndexedDocuments:
    """Read-only view of the documents under `prefix`; all stays on disk, memory-mapped.

    Constructing reads the .json, the header of the .idx and the sizes of the files. What takes longer with
    more documents is checked once, when `sizes` is first used.

    Attributes:
        prefix: as given.
        info: the CorpusInfo; None for a pair that Megatron wrote.
        has_roles: whether each token has a role.
        dtype: of the tokens on disk.
        num_documents, num_tokens: of the whole corpus. A document may have no tokens.

    Raises:
        ValueError: a file is missing, malformed, truncated or empty, or they do not belong together.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        for suffix in (".bin", ".idx"):
            if not os.path.isfile(f"{prefix}{suffix}"):
                raise ValueError(f"no data at {prefix}: {prefix}{suffix} is missing; prepare the data again")
        self.info = read_info(prefix) if os.path.exists(f"{prefix}.json") else None
        if self.info is None and os.path.exists(f"{prefix}.inputs"):
            raise ValueError(
                f"no data at {prefix}: {prefix}.json is missing, so it was not written to the end; prepare "
                "the data again"
            )
        self._index = Index(f"{prefix}.idx")
        self.dtype = self._index.dtype
        self.num_documents, self.num_tokens = self._index.num_documents, self._index.num_tokens
        if self.info and (self.info.documents, self.info.tokens) != (self.num_documents, self.num_tokens):
            raise ValueError(f"{prefix}.json does not belong to {prefix}.idx; prepare the data again")
        self.has_roles = bool(self.info and self.info.has_roles)
        self._check_length(".bin", self.dtype.itemsize)
        if self.has_roles:
            self._check_length(".roles", 1)
        if not self.num_tokens:
            raise ValueError(f"{prefix}.bin is empty: there are no tokens in {self.num_documents} documents")

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return type(self), (self.prefix,)  # a worker process maps the files itself

    @property
    def sizes(self) -> np.ndarray:
        """Tokens of each document, integer [N], memory-mapped.

        Raises:
            ValueError: the .idx is damaged.
        """
        return self._checked[0]

    @cached_property
    def sizes_sha256(self) -> str:
        """sha256 of `sizes` as int64, in hexadecimal: equal iff the documents have equal lengths."""
        return self.info.sizes_sha256 if self.info else self._checked[1]

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens `start` up to `stop` of a document, a view of the file.

        Raises:
            IndexError: there is no such document, or it has no such tokens.
        """
        return self._bin[self._slice(document, start, stop)]

    def roles(self, document: int, start: int, stop: int) -> np.ndarray:
        """Their roles, uint8; only if `has_roles`.

        Raises:
            IndexError: there is no such document, or it has no such tokens.
        """
        return self._roles[self._slice(document, start, stop)]

    def name(self, document: int) -> str:
        """What to call a document in a message: its input and its place there, counted from 0."""
        if not os.path.exists(f"{self.prefix}.inputs"):
            return f"{self.prefix} document {document}"
        first, name = 0, self.prefix
        with open(f"{self.prefix}.inputs", encoding="utf-8", errors="surrogateescape", newline="\n") as file:
            for line in file:
                begin, _, path = line.rstrip("\n").partition("\t")
                if int(begin) > document:
                    break
                first, name = int(begin), path
        return f"{name} document {document - first}"

    @cached_property
    def _checked(self) -> tuple[np.ndarray, str]:
        sizes, sha256 = self._index.checked_sizes()
        if self.info and sha256 != self.info.sizes_sha256:
            raise ValueError(
                f"{self.prefix}.json does not belong to {self.prefix}.idx: the documents have other sizes; "
                "prepare the data again"
            )
        return sizes, sha256

    @cached_property
    def _bin(self) -> np.ndarray:
        return self._map(".bin", self.dtype)

    @cached_property
    def _roles(self) -> np.ndarray:
        if not self.has_roles:
            raise ValueError(
                f"{self.prefix} does not say who speaks; prepare it by megatsp preprocess --format chat, "
                "prompt or instruction"
            )
        return self._map(".roles", np.dtype(np.uint8))

    def _map(self, suffix: str, dtype: np.dtype) -> np.ndarray:
        return map_file(f"{self.prefix}{suffix}", dtype, self.num_tokens)

    def _slice(self, document: int, start: int, stop: int) -> slice:
        if not 0 <= document < self.num_documents:
            raise IndexError(f"document {document} of {self.prefix}, which has {self.num_documents}")
        begin, end = self._index.span(document)
        if not 0 <= start <= stop <= end - begin:
            raise IndexError(
                f"tokens {start} to {stop} of document {document} of {self.prefix}, which has {end - begin}"
            )
        return slice(begin + start, begin + stop)

    def _check_length(self, suffix: str, itemsize: int) -> None:
        path = f"{self.prefix}{suffix}"
        if not os.path.isfile(path):
            raise ValueError(f"no data at {self.prefix}: {path} is missing; prepare the data again")
        found_bytes, expected_bytes = os.path.getsize(path), self.num_tokens * itemsize
        if found_bytes != expected_bytes:
            raise ValueError(
                f"{path} is truncated or not the one that was indexed: it has {found_bytes} bytes, its "
                f".idx describes {expected_bytes}; prepare the data again"
            )


class IndexedWriter:
    """Writes documents one at a time, in memory that does not grow.

    Use it as a context manager. Files have temporary names until the block ends without an exception; after
    an exception nothing is left behind and what stood under `prefix` still stands.

    Args:
        prefix: of the files.
        tokenizer: whose ids are written.
        source: CorpusInfo.source.
        roles: whether each token has a role.

    Raises:
        ValueError: on leaving the block, if no document was added.
    """

    def __init__(
        self, prefix: str | Path, tokenizer: Tokenizer, source: str = "", roles: bool = False
    ) -> None:
        self.prefix = str(prefix)
        self._tokenizer, self._source, self._roles = tokenizer, source, roles
        self._files = TokenFiles(
            self._temporary, tokenizer.vocab_size, tokenizer.eod, token_code(tokenizer.vocab_size), roles
        )
        self.add = self._files.add

    def __enter__(self) -> Self:
        Path(self.prefix).parent.mkdir(parents=True, exist_ok=True)
        self._files.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._files.__exit__(kind, error, trace)
            if kind is None:
                commit(
                    self.prefix,
                    self._temporary,
                    self._tokenizer,
                    self._files.counts,
                    self._source,
                    self._roles,
                )
        finally:
            token_files.remove(self._temporary, self._roles)

    def _temporary(self, suffix: str) -> str:
        return temporary_name(self.prefix, suffix)


def temporary_name(prefix: str, suffix: str) -> str:
    """What PREFIX.suffix is called while this process writes it."""
    return f"{prefix}{suffix}.{os.getpid()}.tmp"


def commit(
    prefix: str,
    path: PathOf,
    tokenizer: Tokenizer,
    counts: Counts,
    source: str,
    roles: bool,
    rejects: Mapping[str, int] | None = None,
    more: Mapping[str, Any] | None = None,
) -> CorpusInfo:
    """Turn the files of a TokenFiles, named by `path`, into the corpus `prefix`, and return its description.

    What stood there is replaced, or still stands after an exception before the first of the new files does.

    Args:
        more: written to the .json too.

    Raises:
        ValueError: there is no document.
    """
    if not counts.documents:
        raise ValueError(f"nothing to write at {prefix}: no document was added")
    index, description = temporary_name(prefix, ".idx"), temporary_name(prefix, ".json")
    try:
        code = token_code(tokenizer.vocab_size)
        documents, tokens, sizes_sha256 = write_index(index, path(".sizes"), code)
        assert (documents, tokens) == (counts.documents, counts.tokens), (documents, tokens, counts)
        info = CorpusInfo(
            tokenizer=tokenizer.name,
            tokenizer_fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            eod=tokenizer.eod,
            source=source,
            sizes_sha256=sizes_sha256,
            has_roles=roles,
            rejects=dict(rejects or {}),
            **asdict(counts),
        )
        with open(description, "wb") as file:
            file.write(json.dumps({**asdict(info), **(more or {})}, indent=1).encode())
            file.flush()
            os.fsync(file.fileno())
        # Without .json and .idx a prefix holds no data, so an interruption here cannot mix old and new.
        for suffix in (".json", ".idx", ".roles"):
            Path(f"{prefix}{suffix}").unlink(missing_ok=True)
        for suffix in (".bin", ".inputs", *((".roles",) if roles else ())):
            os.replace(path(suffix), f"{prefix}{suffix}")
        os.replace(index, f"{prefix}.idx")
        os.replace(description, f"{prefix}.json")
    finally:
        for name in (index, description):
            Path(name).unlink(missing_ok=True)
    return info


def read_info(prefix: str | Path) -> CorpusInfo:
    """The CorpusInfo in PREFIX.json.

    Raises:
        ValueError: the file is missing, is no JSON, or lacks a key.
    """
    path = f"{prefix}.json"
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"no data at {prefix}: {path} is missing") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    keys = [field.name for field in fields(CorpusInfo)]
    missing = [key for key in keys if key not in content] if isinstance(content, dict) else keys
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}; prepare the data again")
    return CorpusInfo(**{key: content[key] for key in keys})
