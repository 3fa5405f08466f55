"""Hugging Face's fast tokenizers: what stands in a tokenizer.json, and who says where a document ends."""

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megatsp.data.tokenizer.base import (
    EOD_NAMES,
    Tokenizer,
    check_text,
    choose_eod,
    read_chat_template,
    read_json,
    sha256_of_json,
)
from megatsp.data.tokenizer.exact import is_byte_level, token_bytes

if TYPE_CHECKING:
    import tokenizers

# All that is read of a folder or a hub's repository: never code, never a pickle.
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")

# What of a tokenizer.json decides ids and what they mean. The post-processor only adds tokens, which we never
# ask for; truncation and padding are switched off.
DECISIVE = ("added_tokens", "normalizer", "pre_tokenizer", "decoder", "model")


BATCH = 64  # texts that are encoded at once


class HuggingFaceTokenizer(Tokenizer):
    """Any fast tokenizer, from the files in FILES, of which tokenizer.json alone is needed.

    Text that spells a special token is encoded as text, also where the model itself has a piece of that
    spelling; truncation and padding settings are switched off; no begin-of-sequence id is added.

    eod is the eos_token of tokenizer_config.json, or of the older special_tokens_map.json, or else the first
    of EOD_NAMES. Special tokens that only tokenizer_config.json knows are added, as transformers does.

    token_bytes is exact for byte-level models that know every byte, and, of the normalised text (a space put
    before it included), for those that write spaces as U+2581 and fall back to bytes, as Llama 2's. Elsewhere
    it is None: the ids of WordPiece, and of Unigram without bytes, may stand for text that they do not hold.

    Raises:
        ValueError: a file cannot be read, the files contradict each other, or nothing names a special token
            that ends a document.
    """

    def __init__(self, files: dict[str, bytes], name: str) -> None:
        self.name = name
        self._files = dict(files)
        try:
            content, extra, self.eod = _read(self._files, name)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                f"a file of {name} is not laid out as a tokenizer's: {type(error).__name__} {error}"
            ) from None
        self._backend = _backend(_guarded(content), name, is_text=True)
        self._rendered: tokenizers.Tokenizer | None = None
        for token in extra:
            found = self._backend.token_to_id(token["content"])
            if found != token["id"]:
                raise ValueError(
                    f"tokenizer_config.json of {name} gives {token['content']!r} the id {token['id']}, but "
                    f"by tokenizer.json it would be {found}: restore the two files from one source"
                )
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        self._vocab_size = max(vocabulary.values()) + 1
        self.special_tokens = {t["content"]: t["id"] for t in content["added_tokens"] if t["special"]}
        self.token_bytes = token_bytes(content, vocabulary)
        self._is_byte_level = self.token_bytes is not None and is_byte_level(content)
        self.chat_template = read_chat_template(self._files, name)
        # The raw content, so that neither a path nor a tokenizer_config.json that repeats it makes a
        # difference.
        raw = read_json(self._files, "tokenizer.json", name)
        self.fingerprint = sha256_of_json(
            {key: raw.get(key) for key in DECISIVE} | {"eod": self.eod, "extra": extra}
        )

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, added tokens included."""
        return self._vocab_size

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text. The library's threads take part unless TOKENIZERS_PARALLELISM is false."""
        ids: list[list[int]] = []
        for begin in range(0, len(texts), BATCH):
            batch = texts[begin : begin + BATCH]
            for text in batch:
                check_text(text)
            # Without offsets this takes a fifth less time than encode; many short texts at once take more.
            ids += [e.ids for e in self._backend.encode_batch_fast(batch, add_special_tokens=False)]
        return ids

    def encode_rendered(self, text: str) -> tuple[list[int], list[int]]:
        """Ids, special tokens recognised; and the character that each begins at or in."""
        check_text(text)
        if self._rendered is None:
            content, _, _ = _read(self._files, self.name)
            self._rendered = _backend(content, self.name, is_text=False)
        encoding = self._rendered.encode(text, add_special_tokens=False)
        return encoding.ids, [start for start, _ in encoding.offsets]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, by the bytes where the model is byte-level, or else by the file's decoder."""
        if self._is_byte_level:
            return super().decode(ids)
        self._check_ids(ids)
        text: str = self._backend.decode(list(ids), skip_special_tokens=True)
        return text

    def files(self) -> dict[str, bytes]:
        """The files that it was read from, as they were."""
        return dict(self._files)

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        return type(self), (self._files, self.name)


def files_of_vocabulary(name: str, vocab: bytes, merges: bytes) -> dict[str, bytes]:
    """The files of a byte-level BPE that GPT-2's vocab.json and merges.txt describe; it ends documents by
    `<|endoftext|>`, added if the vocabulary lacks it.

    Raises:
        ValueError: the two do not make a BPE.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    ids = read_json({"the vocabulary": vocab}, "the vocabulary", name)
    try:
        lines = merges.decode("utf-8").split("\n")
        pairs = [
            (a, b) for a, b in (line.split(" ") for line in lines if line and not line.startswith("#version"))
        ]
        backend = tokenizers.Tokenizer(models.BPE(ids, pairs))
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ValueError(f"{name} is no vocabulary with its merges: {error}") from None
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([EOD_NAMES[0]])
    config = {"eos_token": EOD_NAMES[0], "tokenizer_class": "PreTrainedTokenizerFast"}
    return {
        "tokenizer.json": backend.to_str().encode("utf-8"),
        "tokenizer_config.json": json.dumps(config).encode("ascii"),
    }


def _read(files: dict[str, bytes], name: str) -> tuple[dict[str, Any], list[dict[str, Any]], int]:
    """The tokenizer.json as we use it; the added tokens that only tokenizer_config.json knows; eod."""
    content = read_json(files, "tokenizer.json", name)
    model = content.get("model")
    if (
        not isinstance(model, dict)
        or "vocab" not in model
        or not isinstance(content.get("added_tokens", []), list)
    ):
        raise ValueError(f"{name} is not a readable tokenizer.json: it has no model with a vocabulary")
    content |= {"truncation": None, "padding": None, "post_processor": None}
    content["added_tokens"] = added = content.get("added_tokens") or []
    config = read_json(files, "tokenizer_config.json", name)
    ids = _ids(model) | {token["content"]: token["id"] for token in added}
    extra = []
    for key, token in (config.get("added_tokens_decoder") or {}).items():
        if token["content"] not in ids:
            extra.append(_added_token(token["content"], int(key), bool(token.get("special"))))
    added += extra
    ids |= {token["content"]: token["id"] for token in extra}
    eos = _eos(config) or _eos(read_json(files, "special_tokens_map.json", name))
    if eos is None:
        eod = choose_eod({token["content"]: token["id"] for token in added if token["special"]}, name)
    elif eos not in ids:
        raise ValueError(
            f"eos_token of {name} is {eos!r}, which is not in tokenizer.json: restore the two files"
        )
    else:
        eod = ids[eos]
        own = [token for token in added if token["id"] == eod]
        for token in own:
            token["special"] = True  # so that text never ends a document
        if not own:
            added.append(_added_token(eos, eod, special=True))
    added.sort(key=lambda token: token["id"])
    return content, extra, eod


def _ids(model: dict[str, Any]) -> dict[str, int]:
    """Ids by token, of a model without its added tokens; Unigram lists pieces with scores in order of id."""
    vocab = model["vocab"]
    return dict(vocab) if isinstance(vocab, dict) else {piece: i for i, (piece, _) in enumerate(vocab)}


def _eos(config: dict[str, Any]) -> str | None:
    """The eos_token, which is its text or an object that holds it."""
    token = config.get("eos_token")
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _added_token(content: str, i: int, special: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": content, "special": special} | flags


def _guarded(content: dict[str, Any]) -> dict[str, Any]:
    """The same tokenizer, whose model cannot find a special token in text.

    Special tokens are switched off by the library, but the model may have a piece of the same spelling, as
    Unigram has for `</s>`: before the model sees the text, such a spelling is cut after its first character.
    """
    model = content["model"]
    pieces = set(_ids(model))
    if model.get("type") == "BPE" and not model.get("ignore_merges"):
        merges = [
            merge if isinstance(merge, list) else merge.split(" ", 1) for merge in model.get("merges", [])
        ]
        pieces = {a + b for a, b in merges}
    spelt = [t["content"] for t in content["added_tokens"] if t["special"] and t["content"] in pieces]
    cuts = [f"{re.escape(text[0])}(?={re.escape(text[1:])})" for text in spelt if len(text) > 1]
    if not cuts:
        return content
    pattern = {"Regex": "|".join(cuts)}
    cut = {"type": "Split", "pattern": pattern, "behavior": "MergedWithPrevious", "invert": False}
    before = [content["pre_tokenizer"]] if content.get("pre_tokenizer") else []
    return content | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [*before, cut]}}


def _backend(content: dict[str, Any], name: str, is_text: bool) -> "tokenizers.Tokenizer":
    """The library's tokenizer. is_text: special tokens are not looked for."""
    import tokenizers

    try:
        backend = tokenizers.Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # the library raises bare Exception for a malformed file
        raise ValueError(f"{name} is not a readable tokenizer.json: {error}") from None
    backend.encode_special_tokens = is_text
    return backend
