"""tiktoken's encodings: by name, or from a file of ranks such as Llama 3's tokenizer.model."""

import base64
import binascii
import json
from collections.abc import Sequence
from typing import Any

from megatsp.data.tokenizer.base import (
    EOD_NAMES,
    MANIFEST,
    Tokenizer,
    check_text,
    choose_eod,
    read_chat_template,
    sha256_of_json,
)
from megatsp.nearest import did_you_mean

RANKS = "tokenizer.tiktoken"

# How cl100k_base splits text before it merges; Llama 3 splits alike.
CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)


class TiktokenTokenizer(Tokenizer):
    """A byte-level BPE as tiktoken runs it: the ids of encode_ordinary; token_bytes is exact.

    Args:
        ranks: ids by bytes.
        pattern: the regular expression that splits text.
        special_tokens: ids by text; None: the file says nothing about any, and eod, `<|endoftext|>`, takes
            the first id after the ranks. In Llama 3 that is the id of `<|begin_of_text|>`: to have its own
            special tokens, give the tokenizer.json that comes with it instead.
        extra_files: what stands beside the ranks: tokenizer_config.json, chat_template.jinja.

    Raises:
        ValueError: the ranks lack a byte, or nothing ends a document.
    """

    def __init__(
        self,
        ranks: dict[bytes, int],
        name: str,
        pattern: str = CL100K,
        special_tokens: dict[str, int] | None = None,
        extra_files: dict[str, bytes] | None = None,
    ) -> None:
        import tiktoken

        missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
        if missing:
            raise ValueError(f"{name} has no rank for {len(missing)} of the 256 bytes, as 0x{missing[0]:02X}")
        if special_tokens is None:
            special_tokens = {EOD_NAMES[0]: max(ranks.values()) + 1}
        self.name = name
        self.special_tokens = dict(special_tokens)
        self.eod = choose_eod(self.special_tokens, name)
        self.chat_template = read_chat_template(extra_files or {}, name)
        self._ranks, self._pattern, self._extra_files = ranks, pattern, extra_files or {}
        try:
            self._encoding = tiktoken.Encoding(
                name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=self.special_tokens
            )
        except Exception as error:  # the library's Rust raises ValueError or its own panic
            raise ValueError(f"{name} is no usable tiktoken encoding: {error}") from None
        self.token_bytes: list[bytes] = [b""] * (max(*ranks.values(), *self.special_tokens.values()) + 1)
        for token, i in ranks.items():
            self.token_bytes[i] = token
        self.fingerprint = sha256_of_json(self._manifest() | {"ranks": self._file().decode("ascii")})

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, special tokens included."""
        return len(self.token_bytes)

    def encode(self, text: str) -> list[int]:
        """The ids of encode_ordinary."""
        check_text(text)
        return self._encoding.encode_ordinary(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, in this thread."""
        return [self.encode(text) for text in texts]

    def encode_rendered(self, text: str) -> tuple[list[int], list[int]]:
        """Ids, special tokens recognised; and the character that each begins at or in."""
        check_text(text)
        ids = self._encoding.encode(text, allowed_special="all")
        starts, length = [], 0
        for token in self._encoding.decode_tokens_bytes(ids):
            begins_inside = 0x80 <= token[0] < 0xC0
            starts.append(length - begins_inside)
            length += sum(not 0x80 <= byte < 0xC0 for byte in token)
        return ids, starts

    def files(self) -> dict[str, bytes]:
        """The ranks, and beside them the pattern and the special tokens."""
        manifest = json.dumps(self._manifest(), indent=2).encode("ascii") + b"\n"
        return {RANKS: self._file(), MANIFEST: manifest, **self._extra_files}

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        return type(self), (self._ranks, self.name, self._pattern, self.special_tokens, self._extra_files)

    def _manifest(self) -> dict[str, Any]:
        return {"type": "tiktoken", "pattern": self._pattern, "special_tokens": self.special_tokens}

    def _file(self) -> bytes:
        rows = sorted(self._ranks.items(), key=lambda row: row[1])
        return b"".join(base64.b64encode(token) + b" %d\n" % i for token, i in rows)


def named(name: str) -> TiktokenTokenizer:
    """The encoding that tiktoken knows by `name`, from its cache or, if it is not there, its server.

    Raises:
        ValueError: tiktoken knows no such encoding, or cannot get its file.
    """
    import tiktoken

    known = sorted(tiktoken.list_encoding_names())
    if name not in known:
        raise ValueError(
            f"tiktoken knows no encoding {name!r}{did_you_mean(name, known)} (it knows {', '.join(known)})"
        )
    try:
        encoding = tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:  # of requests and of files; of a wrong hash
        raise ValueError(
            f"cannot get tiktoken:{name}: {error}. It is not in tiktoken's cache: load it once with network "
            "and with TIKTOKEN_CACHE_DIR set to a folder, then set that here; or give a local *.tiktoken file"
        ) from None
    return TiktokenTokenizer(
        encoding._mergeable_ranks,
        f"tiktoken:{name}",
        encoding._pat_str,
        encoding._special_tokens,
    )


def read_ranks(content: bytes, name: str) -> dict[bytes, int]:
    """Ids by bytes, of a file whose lines are the bytes in base64, a space and the id.

    Raises:
        ValueError: another line.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(
                f"{name}, line {number}: {line[:40]!r} is no line of a tiktoken file: base64, a space, a "
                "number"
            ) from None
    if len(set(ranks.values())) != len(ranks):
        raise ValueError(f"{name} gives one number to several tokens")
    return ranks
