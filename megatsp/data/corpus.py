"""One source of documents: a .bin/.idx pair, or a folder of them that are read one after the other."""

import hashlib
from bisect import bisect_right
from functools import cached_property
from pathlib import Path

import numpy as np

from megatsp.data.indexed import SUFFIXES, IndexedDocuments
from megatsp.data.tokenizer import Tokenizer


class Corpus:
    """The documents of a source, numbered through. Opening reads no document and no list of them.

    Args:
        source: a prefix, or a folder whose pairs are taken in the order of their names.

    Attributes:
        shards: its IndexedDocuments.
        num_documents, num_tokens, has_roles: of all of them.

    Raises:
        ValueError: nothing there, a shard that cannot be read, or shards of different kinds.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        folder = Path(source)
        prefixes = [source]
        if folder.is_dir():  # any file of a shard: one that is not whole is refused, not left out
            files = [file for suffix in SUFFIXES[:-1] for file in folder.glob(f"*{suffix}")]
            prefixes = sorted({str(file.with_suffix("")) for file in files})
        if not prefixes:
            raise ValueError(
                f"no data in {source}: the folder holds no .idx file; give a prefix or another folder"
            )
        self.shards = [IndexedDocuments(prefix) for prefix in prefixes]
        self.has_roles = self.shards[0].has_roles
        if any(shard.has_roles != self.has_roles for shard in self.shards):
            raise ValueError(
                f"{source} mixes shards with and without .roles: what is trained would depend on the "
                "shard; give them as two sources"
            )
        ends = np.cumsum([shard.num_documents for shard in self.shards])
        self._first = np.concatenate([[0], ends[:-1]])
        self._firsts: list[int] = self._first.tolist()
        self.num_documents = int(ends[-1])
        self.num_tokens = sum(shard.num_tokens for shard in self.shards)

    @cached_property
    def key(self) -> str:
        """Equal where the documents' sizes are, all and in order: what indices of samples depend on."""
        return hashlib.sha256(" ".join(shard.sizes_sha256 for shard in self.shards).encode()).hexdigest()

    def sizes(self, documents: np.ndarray) -> np.ndarray:
        """Tokens of these documents: int64 like `documents`."""
        if len(self.shards) == 1:
            return self.shards[0].sizes[documents].astype(np.int64)
        found = np.empty(len(documents), np.int64)
        shards = np.searchsorted(self._first, documents, side="right") - 1
        for i in np.unique(shards):
            chosen = shards == i
            found[chosen] = self.shards[i].sizes[documents[chosen] - self._first[i]]
        return found

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens start to stop of a document, a view of the file."""
        shard, document = self._locate(document)
        return shard.tokens(document, start, stop)

    def roles(self, document: int, start: int, stop: int) -> np.ndarray:
        """Their roles, uint8: see `megatsp.data.indexed`."""
        shard, document = self._locate(document)
        return shard.roles(document, start, stop)

    def name(self, document: int) -> str:
        """What messages call a document."""
        shard, document = self._locate(document)
        return shard.name(document)

    def check(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """Check that ids mean what `tokenizer` says, and that a model with `vocab_size` rows has them all.

        A corpus made by Megatron does not say what made it: then nothing is known before it is read.

        Raises:
            ValueError: another tokenizer's data, or too few rows.
        """
        for shard in self.shards:
            info = shard.info
            if info is None:
                continue
            if info.tokenizer_fingerprint != tokenizer.fingerprint:
                raise ValueError(
                    f"{shard.prefix} was written with another tokenizer: '{info.tokenizer}', fingerprint "
                    f"{info.tokenizer_fingerprint[:12]}, vocab_size {info.vocab_size}; this one is "
                    f"'{tokenizer.name}', fingerprint {tokenizer.fingerprint[:12]}, vocab_size "
                    f"{tokenizer.vocab_size}. Set data.tokenizer to the former or prepare the data again"
                )
            needed = max(info.vocab_size, info.max_token_id + 1)
            if vocab_size < needed:
                raise ValueError(
                    f"model.vocab_size is {vocab_size}, but {shard.prefix} needs {needed}: its tokenizer has "
                    f"{info.vocab_size} ids and the largest id in the data is {info.max_token_id}"
                )

    def _locate(self, document: int) -> tuple[IndexedDocuments, int]:
        i = bisect_right(self._firsts, document) - 1
        return self.shards[i], document - self._firsts[i]
