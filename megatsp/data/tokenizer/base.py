"""What every tokenizer is: text to ids and back, and the bytes that ids stand for where they have any."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

# Where nothing says which special token ends a document, the first of these that there is.
EOD_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>")

# In a folder that files() were written to: which kind of tokenizer it is, where no other file says so.
MANIFEST = "megatsp_tokenizer.json"


class Tokenizer(ABC):
    """Text to ids and back. Special tokens, `eod` (end of document) among them, never arise from text.

    Attributes:
        name: what it was loaded from.
        eod: the id that ends a document.
        fingerprint: sha256 in hexadecimal; equal only where equal ids mean the same.
        token_bytes: the bytes that each id stands for, none for special tokens; None where ids stand for no
            exact bytes. Of a tokenizer that normalises text, the bytes of the normalised text.
        chat_template: Jinja source of the tokenizer's own chat template, or None.
        special_tokens: the ids of special tokens by their text.
    """

    name: str
    eod: int
    fingerprint: str
    token_bytes: list[bytes] | None
    chat_template: str | None = None
    special_tokens: dict[str, int]

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """One more than the largest id."""

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; no special token arises from it and none is added.

        Raises:
            ValueError: the text holds a lone surrogate, which has no UTF-8.
        """
        return list(self.encode_batch([text])[0])

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> Sequence[Sequence[int] | np.ndarray]:
        """The ids of each text, as encode gives them, faster."""

    @abstractmethod
    def encode_rendered(self, text: str) -> tuple[list[int], list[int]]:
        """Ids of a rendered chat, in which the texts of special tokens are those tokens.

        Returns:
            the ids, and for each the index of the character in `text` that it begins at or in.
        """

    @abstractmethod
    def files(self) -> dict[str, bytes]:
        """Its files: load_tokenizer of a folder that holds them gives the same fingerprint."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; bytes that are no valid UTF-8 become U+FFFD, special tokens become nothing.

        Raises:
            ValueError: an id outside [0, vocab_size).
        """
        assert self.token_bytes is not None
        self._check_ids(ids)
        return b"".join(self.token_bytes[i] for i in ids).decode("utf-8", errors="replace")

    def bytes_per_token(self) -> np.ndarray | None:
        """Lengths of token_bytes, int64 [vocab_size], 0 for special tokens; None without token_bytes."""
        if self.token_bytes is None:
            return None
        return np.array([len(b) for b in self.token_bytes], dtype=np.int64)

    def _check_ids(self, ids: Sequence[int]) -> None:
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"cannot decode id {i}: {self.name} has the ids 0 to {self.vocab_size - 1}")


def check_text(text: str) -> None:
    """Refuses what no tokenizer can take: the libraries would replace it silently or fail obscurely.

    Raises:
        ValueError: the text holds a lone surrogate.
    """
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"character {error.start} of the text is the lone surrogate U+{ord(text[error.start]):04X}, "
            "which has no UTF-8: it was decoded wrongly; leave the text out or repair it"
        ) from None


def choose_eod(special_tokens: dict[str, int], name: str) -> int:
    """The special token that ends a document, where nothing names it.

    Raises:
        ValueError: there is none of EOD_NAMES.
    """
    for text in EOD_NAMES:
        if text in special_tokens:
            return special_tokens[text]
    shown = list(special_tokens)
    raise ValueError(
        f"{name} has no end-of-document token: name one as eos_token in a tokenizer_config.json beside it, "
        f"or add one of {', '.join(EOD_NAMES)} as a special token (its special tokens: "
        f"{', '.join(shown[:20]) or 'none'}{f' and {len(shown) - 20} more' if len(shown) > 20 else ''})"
    )


def read_chat_template(files: dict[str, bytes], name: str) -> str | None:
    """The template in chat_template.jinja, or else in tokenizer_config.json: the one, or that named default.

    Raises:
        ValueError: a file cannot be read.
    """
    if "chat_template.jinja" in files:
        try:
            return files["chat_template.jinja"].decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"chat_template.jinja of {name} is not UTF-8: {error}") from None
    template = read_json(files, "tokenizer_config.json", name).get("chat_template")
    if isinstance(template, list):  # [{"name": ..., "template": ...}, ...]
        template = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}.get("default")
    return template if isinstance(template, str) else None


def read_json(files: dict[str, bytes], file: str, name: str) -> dict[str, Any]:
    """The JSON object in one of the files; empty if the file is not there.

    Raises:
        ValueError: it is no JSON object.
    """
    if file not in files:
        return {}
    try:
        content = json.loads(files[file])
    except ValueError as error:
        raise ValueError(f"{file} of {name} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} of {name} is no JSON object, but a {type(content).__name__}")
    return content


def sha256_of_json(content: Any) -> str:
    """Of the canonical serialisation: no formatting, sorted keys."""
    canonical = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()
