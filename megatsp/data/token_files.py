"""Documents in the order in which they come, on the way to a .bin: tokens, sizes, roles and inputs.

A TokenFiles is what a writer fills; it needs no more memory for more documents. `merge` makes one of several.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np

from megatsp.data.index_file import DTYPE_OF_CODE

NUM_ROLES = 3  # not the assistant's, assistant's in an earlier turn, assistant's last turn
MAX_DOCUMENT_TOKENS = 2**31 - 1
PathOf = Callable[[str], str]  # from a suffix to the name of the file


@dataclass
class Counts:
    """What was written. `bytes` counts the UTF-8 text."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    max_token_id: int = 0

    def add(self, other: "Counts") -> None:
        """Count the other's documents too."""
        self.documents += other.documents
        self.tokens += other.tokens
        self.bytes += other.bytes
        self.max_token_id = max(self.max_token_id, other.max_token_id)


class TokenFiles:
    """Appends documents to files that `path(suffix)` names: .bin, .sizes, .inputs and, if asked for, .roles.

    Use it as a context manager. Without an exception all is on the disk when the block ends.

    Args:
        path: the name of the file with a suffix.
        vocab_size: ids are below it.
        eod: the id that ends a document.
        code: Megatron's, of the dtype of the tokens.
        roles: whether each token has a role.
    """

    def __init__(self, path: PathOf, vocab_size: int, eod: int, code: int, roles: bool = False) -> None:
        self.counts = Counts()
        self._path, self._vocab_size, self._eod, self._roles = path, vocab_size, eod, roles
        self._dtype = np.dtype(DTYPE_OF_CODE[code])
        self._name: str | None = None
        self._files: dict[str, BinaryIO] = {}

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for suffix in suffixes(self._roles):
                self._files[suffix] = stack.enter_context(open(self._path(suffix), "wb"))
            stack.pop_all()
        return self

    def add(
        self,
        name: str,
        ids: Sequence[int] | np.ndarray,
        num_bytes: int,
        roles: np.ndarray | None = None,
        eod: bool = True,
    ) -> None:
        """Append one document of the input `name`: `ids`, then eod if wanted.

        The role of an added eod is that of the token before it.

        Raises:
            ValueError: the document is empty, longer than 2^31 - 1 tokens, has an id that the tokenizer
                does not have, or a role too few, too many or unknown.
        """
        tokens = np.asarray(ids, dtype=np.int64)
        size = tokens.size + eod
        if tokens.size == 0 or size > MAX_DOCUMENT_TOKENS:
            raise ValueError(f"document {name!r} has {tokens.size} tokens; 1 to 2^31 - 2 are possible")
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self._vocab_size:
            raise ValueError(
                f"document {name!r} has ids from {low} to {high}; "
                f"the tokenizer has 0 to {self._vocab_size - 1}"
            )
        if self._roles:
            self._files[".roles"].write(self._role_bytes(name, tokens.size, roles, eod))
        elif roles is not None:
            raise ValueError(f"document {name!r} has roles, but they are not written: give roles=True")
        if eod:
            tokens = np.append(tokens, self._eod)
        self._files[".bin"].write(tokens.astype(self._dtype).tobytes())
        self._files[".sizes"].write(size.to_bytes(4, "little"))
        if name != self._name:
            self._files[".inputs"].write(input_line(self.counts.documents, name))
            self._name = name
        self.counts.add(Counts(1, size, num_bytes, max(high, self._eod if eod else 0)))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with ExitStack() as stack:
            for file in self._files.values():
                stack.enter_context(file)
            if kind is None:
                for file in self._files.values():
                    file.flush()
                    os.fsync(file.fileno())

    def _role_bytes(self, name: str, count: int, roles: np.ndarray | None, eod: bool) -> bytes:
        found = np.asarray([] if roles is None else roles, dtype=np.uint8)
        if found.size != count or int(found.max()) >= NUM_ROLES:
            raise ValueError(
                f"document {name!r} has {found.size} roles for {count} tokens; each has one of 0 to "
                f"{NUM_ROLES - 1}"
            )
        return found.tobytes() + (found[-1:].tobytes() if eod else b"")


def suffixes(roles: bool) -> tuple[str, ...]:
    """Of the files that a TokenFiles writes."""
    return (".bin", ".sizes", ".inputs", *((".roles",) if roles else ()))


def input_line(first_document: int, name: str) -> bytes:
    """The line of PREFIX.inputs for an input whose documents begin at `first_document`."""
    return f"{first_document}\t{name}".replace("\n", "\\n").encode("utf-8", "surrogateescape") + b"\n"


def merge(
    parts: Sequence[tuple[PathOf, int]],
    path: PathOf,
    roles: bool,
    copied: Callable[[int], None] = lambda _: None,
) -> None:
    """Concatenate what several TokenFiles wrote into the files that `path` names.

    Args:
        parts: for each, its `path` and its number of documents.
        copied: called with the number of .bin bytes copied so far.
    """
    for suffix in suffixes(roles):
        with open(path(suffix), "wb") as target:
            if suffix == ".inputs":
                _merge_inputs(parts, target)
            else:
                for part, _ in parts:
                    with open(part(suffix), "rb") as source:
                        shutil.copyfileobj(source, target, 1 << 22)
                    if suffix == ".bin":
                        copied(target.tell())
            target.flush()
            os.fsync(target.fileno())


def _merge_inputs(parts: Sequence[tuple[PathOf, int]], target: BinaryIO) -> None:
    first, last_name = 0, None
    for part, documents in parts:
        with open(part(".inputs"), "rb") as source:
            for line in source:
                begin, _, name = line.partition(b"\t")
                if name != last_name:  # an input may go on in the next part
                    target.write(b"%d\t%s" % (first + int(begin), name))
                    last_name = name
        first += documents


def remove(path: PathOf, roles: bool) -> None:
    """Remove what a TokenFiles wrote, whatever of it is there."""
    for suffix in suffixes(roles):
        Path(path(suffix)).unlink(missing_ok=True)
