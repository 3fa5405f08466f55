"""Tokenizers whose ids stand for exact byte strings, so that a loss converts exactly to bits per byte.

Byte values and byte-level BPE have that property; SentencePiece-style tokenizers do not and are refused.
"""

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

# A tokenizer.json does not say which special token ends a document; these are the names in use.
EOD_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>")


class Tokenizer(ABC):
    """Text to ids and back, where id i stands for the bytes `token_bytes[i]`.

    Special tokens, `eod` (end of document) among them, stand for no bytes and never arise from text.
    """

    name: str
    eod: int
    token_bytes: list[bytes]
    fingerprint: str  # sha256 of the canonical serialisation, in hexadecimal

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without an end-of-document id."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text."""
        return [self.encode(text) for text in texts]

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return len(self.token_bytes)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; bytes that are no valid UTF-8 become U+FFFD, special tokens become nothing.

        Raises:
            ValueError: an id outside [0, vocab_size).
        """
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"cannot decode id {i}: {self.name} has the ids 0 to {self.vocab_size - 1}")
        return b"".join(self.token_bytes[i] for i in ids).decode("utf-8", errors="replace")

    def bytes_per_token(self) -> np.ndarray:
        """UTF-8 bytes that each id stands for, int64 [vocab_size]; 0 for special tokens."""
        return np.array([len(b) for b in self.token_bytes], dtype=np.int64)


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes as ids 0 to 255, and 256 for the end of a document."""

    def __init__(self) -> None:
        self.name = "byte"
        self.eod = 256
        self.token_bytes = [bytes([i]) for i in range(256)] + [b""]
        self.fingerprint = _sha256_of_json({"type": "byte", "eod": self.eod})

    def encode(self, text: str) -> list[int]:
        """The UTF-8 bytes of `text`."""
        return list(text.encode("utf-8"))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """As arrays."""
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]  # type: ignore[misc]


class BPETokenizer(Tokenizer):
    """Byte-level BPE read from a Hugging Face tokenizer.json.

    Text that spells a special token is encoded as text, truncation and padding settings of the file are
    switched off, and no begin-of-sequence id is added. If the file has a Unicode normaliser, ids stand
    for the bytes of the normalised text.

    Raises:
        ValueError: the file is missing, is no byte-level BPE, or has no special token named in EOD_NAMES.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            text = Path(path).read_text(encoding="utf-8")
            content = json.loads(text)
            self._backend = tokenizers.Tokenizer.from_str(text)
        except FileNotFoundError:
            raise ValueError(f"no tokenizer at {path}: give 'byte' or the path of a tokenizer.json") from None
        except Exception as error:  # the tokenizers library raises bare Exception for a malformed file
            raise ValueError(f"{path} is not a readable tokenizer.json: {error}") from None
        if not isinstance(self._backend.model, models.BPE) or '"ByteLevel"' not in json.dumps(
            content["decoder"]
        ):
            raise ValueError(f"{path} is not a byte-level BPE; only those have exact bytes per token")
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True
        self.name = "bpe"
        self.fingerprint = _sha256_of_json(content)
        try:
            self.token_bytes = self._read_token_bytes()
        except KeyError as error:
            raise ValueError(f"{path} is not a byte-level BPE: a token holds {error}") from None
        specials = {t.content: i for i, t in self._backend.get_added_tokens_decoder().items() if t.special}
        known = [specials[name] for name in EOD_NAMES if name in specials]
        if not known:
            raise ValueError(
                f"{path} has no end-of-document token: add one of {', '.join(EOD_NAMES)} as a special token "
                f"(its special tokens: {', '.join(specials) or 'none'})"
            )
        self.eod = known[0]

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without any special token."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, faster."""
        return [e.ids for e in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def _read_token_bytes(self) -> list[bytes]:
        byte_of = _byte_of_character()
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        token_bytes = [b""] * (max(vocabulary.values()) + 1)
        added = self._backend.get_added_tokens_decoder()
        for token, i in vocabulary.items():
            if i in added:
                token_bytes[i] = b"" if added[i].special else token.encode("utf-8")
            else:
                token_bytes[i] = bytes(byte_of[character] for character in token)
        return token_bytes


def load_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer that `spec` names: "byte", a tokenizer.json, or a folder that holds one.

    Raises:
        ValueError: nothing there, or not a byte-level BPE.
    """
    if spec == "byte":
        return ByteTokenizer()
    path = Path(spec)
    return BPETokenizer(path / "tokenizer.json" if path.is_dir() else path)


def from_megatron(
    tokenizer_type: str,
    tokenizer_model: str | None = None,
    vocab_file: str | None = None,
    merge_file: str | None = None,
) -> str:
    """What load_tokenizer takes."""
    if tokenizer_type != "HuggingFaceTokenizer" or not tokenizer_model or vocab_file or merge_file:
        raise ValueError("only --tokenizer-type HuggingFaceTokenizer with --tokenizer-model is known")
    return tokenizer_model


def train_bpe(texts: Iterable[str], vocab_size: int, path: str | Path) -> BPETokenizer:
    """Train a byte-level BPE on `texts`, save it at `path` and return it.

    The ids are `<|endoftext|>` (0), the 256 bytes, then merges. The file appears whole or not at all.

    Raises:
        ValueError: vocab_size is below 257, or the texts are too small for so many tokens.
    """
    if vocab_size < 257:
        raise ValueError(
            f"vocab_size is {vocab_size}: a byte-level BPE needs 257, the bytes and the end of document"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOD_NAMES[0]],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    if backend.get_vocab_size() != vocab_size:
        raise ValueError(
            f"vocab_size is {vocab_size}, but these texts only give {backend.get_vocab_size()} tokens: "
            "lower vocab_size or give more text"
        )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    backend.save(str(temporary))
    os.replace(temporary, path)
    return BPETokenizer(path)


def _byte_of_character() -> dict[str, int]:
    # Byte-level BPE writes printable Latin-1 bytes as themselves and the others, in order, from U+0100 on.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(others)}


def _sha256_of_json(content: Any) -> str:
    canonical = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()
