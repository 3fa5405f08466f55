import json
from pathlib import Path

import numpy as np
import pytest

from megatsp.data.tokenizer import BPETokenizer, ByteTokenizer, load_tokenizer, train_bpe

TEXT = "def f(x):\n    return x + 1  # Ünïcode: 日本語 🙂\r\n\tZero\x00 byte, <|endoftext|> spelt out\n"


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> BPETokenizer:
    return train_bpe([TEXT, "return return return"], 300, tmp_path_factory.mktemp("bpe") / "tokenizer.json")


def edit(tokenizer: BPETokenizer, path: Path, **changes: object) -> Path:
    """The tokenizer.json of `tokenizer` with some keys changed, at `path`."""
    content = json.loads(tokenizer._backend.to_str())
    path.write_text(json.dumps(content | changes))
    return path


def test_byte_tokenizer() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("aß") == [97, 0xC3, 0x9F]
    assert tokenizer.decode([97, 0xC3, 0x9F, 256]) == "aß"
    assert (tokenizer.vocab_size, tokenizer.eod) == (257, 256)
    assert tokenizer.bytes_per_token().tolist() == [1] * 256 + [0]
    assert tokenizer.bytes_per_token().dtype == np.int64


@pytest.mark.parametrize("ids", [[97, 257], [-1]])
def test_decode_refuses_unknown_ids(ids: list[int]) -> None:
    with pytest.raises(ValueError, match=f"cannot decode id {ids[-1]}"):
        ByteTokenizer().decode(ids)


def test_decode_marks_bytes_that_are_no_text() -> None:
    assert ByteTokenizer().decode([97, 0xC3]) == "a\ufffd"


def test_bpe_is_exact_about_text_and_bytes(bpe: BPETokenizer) -> None:
    ids = bpe.encode(TEXT)
    assert len(ids) < len(TEXT.encode())
    assert bpe.decode(ids) == TEXT
    assert int(bpe.bytes_per_token()[ids].sum()) == len(TEXT.encode())
    assert (bpe.vocab_size, bpe.eod, bpe.bytes_per_token()[bpe.eod]) == (300, 0, 0)


def test_every_byte_is_one_bpe_token(bpe: BPETokenizer) -> None:
    assert {token for token in bpe.token_bytes if len(token) == 1} == {bytes([i]) for i in range(256)}


def test_text_that_spells_eod_is_not_eod(bpe: BPETokenizer) -> None:
    assert bpe.eod not in bpe.encode("a<|endoftext|>b")


def test_bpe_training_is_deterministic_and_leaves_one_file(bpe: BPETokenizer, tmp_path: Path) -> None:
    again = train_bpe([TEXT, "return return return"], 300, tmp_path / "new" / "tokenizer.json")
    assert again.fingerprint == bpe.fingerprint
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["tokenizer.json"]


def test_truncation_and_padding_in_the_file_are_switched_off(bpe: BPETokenizer, tmp_path: Path) -> None:
    limit = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    padding = {
        "strategy": {"Fixed": 500},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }
    loaded = BPETokenizer(edit(bpe, tmp_path / "t.json", truncation=limit, padding=padding))
    assert loaded.encode(TEXT) == bpe.encode(TEXT)


def test_added_tokens_that_are_not_special_stand_for_their_text(bpe: BPETokenizer, tmp_path: Path) -> None:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    special = {"id": 0, "content": "<|endoftext|>", "special": True} | flags
    plain = {"id": 300, "content": "<tag>é", "special": False} | flags
    loaded = BPETokenizer(edit(bpe, tmp_path / "t.json", added_tokens=[special, plain]))
    text = "a<tag>éb"
    assert 300 in loaded.encode(text)
    assert loaded.vocab_size == 301
    assert int(loaded.bytes_per_token()[loaded.encode(text)].sum()) == len(text.encode())


def test_fingerprint_ignores_formatting_and_sees_content(bpe: BPETokenizer, tmp_path: Path) -> None:
    path = edit(bpe, tmp_path / "same.json")
    path.write_text(json.dumps(json.loads(path.read_text()), indent=3))
    assert BPETokenizer(path).fingerprint == bpe.fingerprint
    model = json.loads(bpe._backend.to_str())["model"]
    changed = edit(bpe, tmp_path / "other.json", model=model | {"ignore_merges": True})
    assert BPETokenizer(changed).fingerprint != bpe.fingerprint
    assert ByteTokenizer().fingerprint not in (bpe.fingerprint, "")


def test_load_tokenizer(bpe: BPETokenizer, tmp_path: Path) -> None:
    edit(bpe, tmp_path / "tokenizer.json")
    assert isinstance(load_tokenizer("byte"), ByteTokenizer)
    assert load_tokenizer(str(tmp_path)).fingerprint == bpe.fingerprint
    assert load_tokenizer(str(tmp_path / "tokenizer.json")).fingerprint == bpe.fingerprint
    with pytest.raises(ValueError, match=r"no tokenizer at .*missing\.json"):
        load_tokenizer(str(tmp_path / "missing.json"))


def test_unusable_tokenizers(bpe: BPETokenizer, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text('{"version": "1.0"}')
    with pytest.raises(ValueError, match="not a readable"):
        BPETokenizer(tmp_path / "bad.json")
    with pytest.raises(ValueError, match="not a byte-level BPE"):
        BPETokenizer(edit(bpe, tmp_path / "plain.json", decoder=None))
    model = json.loads(bpe._backend.to_str())["model"]
    spaced = model | {"vocab": model["vocab"] | {"with space": 300}}
    with pytest.raises(ValueError, match="not a byte-level BPE: a token holds ' '"):
        BPETokenizer(edit(bpe, tmp_path / "spaced.json", model=spaced))
    words = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    with pytest.raises(ValueError, match="not a byte-level BPE"):
        BPETokenizer(edit(bpe, tmp_path / "words.json", model=words))
    with pytest.raises(ValueError, match="no end-of-document token"):
        BPETokenizer(edit(bpe, tmp_path / "no_eod.json", added_tokens=[]))


@pytest.mark.parametrize("vocab_size, message", [(256, "needs 257"), (100000, "only give")])
def test_impossible_vocabulary_size(tmp_path: Path, vocab_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_bpe([TEXT], vocab_size, tmp_path / "tokenizer.json")
    assert list(tmp_path.iterdir()) == []
