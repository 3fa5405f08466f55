"""The tokenizer that needs no file."""

import json
from collections.abc import Sequence

import numpy as np

from megatsp.data.tokenizer.base import EOD_NAMES, MANIFEST, Tokenizer, check_text, sha256_of_json


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes as ids 0 to 255, and 256 for the end of a document: `<|endoftext|>` in a rendered chat."""

    def __init__(self) -> None:
        self.name = "byte"
        self.eod = 256
        self.token_bytes: list[bytes] = [bytes([i]) for i in range(256)] + [b""]
        self.special_tokens = {EOD_NAMES[0]: self.eod}
        self.fingerprint = sha256_of_json({"type": "byte", "eod": self.eod})

    @property
    def vocab_size(self) -> int:
        """257."""
        return len(self.token_bytes)

    def encode(self, text: str) -> list[int]:
        """The UTF-8 bytes of `text`."""
        check_text(text)
        return list(text.encode("utf-8"))

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The UTF-8 bytes of each text, uint8."""
        for text in texts:
            check_text(text)
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    def encode_rendered(self, text: str) -> tuple[list[int], list[int]]:
        """Bytes, and eod for `<|endoftext|>`; and the character that each is of."""
        check_text(text)
        ids: list[int] = []
        starts: list[int] = []
        position = 0
        for part in text.split(EOD_NAMES[0]):
            if position:
                ids.append(self.eod)
                starts.append(position - len(EOD_NAMES[0]))
            for place, character in enumerate(part, position):
                encoded = character.encode("utf-8")
                ids += encoded
                starts += [place] * len(encoded)
            position += len(part) + len(EOD_NAMES[0])
        return ids, starts

    def files(self) -> dict[str, bytes]:
        """A file that says so."""
        return {MANIFEST: json.dumps({"type": "byte"}).encode() + b"\n"}
