"""Which bytes the ids of a tokenizer.json stand for, where that can be said exactly."""

from typing import Any

SPACE = "\u2581"  # how SentencePiece, and what descends from it, writes a space


def is_byte_level(content: dict[str, Any]) -> bool:
    """Whether text becomes characters that stand for its bytes, and those become text again."""
    before = _types(content.get("pre_tokenizer")) | _types(content.get("normalizer"))
    return "ByteLevel" in before and "ByteLevel" in _types(content.get("decoder"))


def token_bytes(content: dict[str, Any], vocabulary: dict[str, int]) -> list[bytes] | None:
    """The bytes of each id, or None where some id stands for no exact bytes.

    Args:
        content: a tokenizer.json.
        vocabulary: ids by token, added tokens included.
    """
    model = content["model"]
    affixes = any(model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix"))
    swallows = any(
        (token["lstrip"] or token["rstrip"]) and not token["special"] for token in content["added_tokens"]
    )
    if affixes or swallows or model.get("type") not in ("BPE", "Unigram"):
        return None
    if is_byte_level(content):
        byte_of = byte_of_character()
        if not byte_of.keys() <= vocabulary.keys():
            return None  # a byte that is unknown vanishes, or is one unknown token with others
        single = {}
    elif model.get("byte_fallback") and _writes_spaces(content.get("decoder")):
        byte_of = {}
        single = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}
        if not single.keys() <= vocabulary.keys():
            return None
    else:
        return None
    added = {token["id"]: token for token in content["added_tokens"]}
    result = [b""] * (max(vocabulary.values()) + 1)
    for token, i in vocabulary.items():
        if i in added:
            result[i] = b"" if added[i]["special"] else token.encode("utf-8")
        elif single:
            result[i] = single.get(token) or token.replace(SPACE, " ").encode("utf-8")
        elif all(character in byte_of for character in token):
            result[i] = bytes(byte_of[character] for character in token)
        else:
            result[i] = token.encode("utf-8")  # never arises from text; the library's decoder does the same
    return result


def byte_of_character() -> dict[str, int]:
    """How byte-level models write bytes: printable Latin-1 as itself, the others in order from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(others)}


def _types(part: Any) -> set[str]:
    """The types named in a part of a tokenizer.json, those in a sequence included."""
    if isinstance(part, dict):
        own = {part["type"]} if isinstance(part.get("type"), str) else set()
        return own.union(*(_types(value) for value in part.values()))
    if isinstance(part, list):
        return set().union(*(_types(value) for value in part))
    return set()


def _writes_spaces(decoder: Any) -> bool:
    """Whether a decoder turns U+2581 into a space, and otherwise only puts bytes and pieces together."""
    if not isinstance(decoder, dict):
        return False
    steps = decoder["decoders"] if decoder.get("type") == "Sequence" else [decoder]
    known = {"Replace", "Metaspace", "ByteFallback", "Fuse", "Strip"}
    spaces = [
        step
        for step in steps
        if (step.get("type"), step.get("pattern"), step.get("content")) == ("Replace", {"String": SPACE}, " ")
        or (step.get("type"), step.get("replacement")) == ("Metaspace", SPACE)
    ]
    return bool(spaces) and all(step.get("type") in known for step in steps)
