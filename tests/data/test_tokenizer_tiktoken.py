"""tiktoken's encodings, from a local file of ranks and by name."""

import base64
import hashlib
import pickle
from pathlib import Path

import pytest
import tiktoken
from texts import RENDERED, TRICKY
from tiktoken_ext.openai_public import ENCODING_CONSTRUCTORS

from megatsp.data.tokenizer import TiktokenTokenizer, load_tokenizer, train_bpe
from megatsp.data.tokenizer.tiktoken import CL100K, named


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[bytes, int]:
    """Ids by bytes: those of a BPE trained on the spot, whose order tiktoken needs."""
    bpe = train_bpe(TRICKY * 3, 400, tmp_path_factory.mktemp("bpe") / "t.json")
    assert bpe.token_bytes is not None
    return {token: i for i, token in enumerate(sorted(bpe.token_bytes[1:], key=len))}


@pytest.fixture(scope="module")
def folder(ranks: dict[bytes, int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiktoken")
    lines = b"".join(base64.b64encode(token) + b" %d\n" % i for token, i in ranks.items())
    (folder / "tokenizer.model").write_bytes(lines)  # the name that Llama 3 gives it
    return folder


def test_the_pattern_is_that_of_cl100k(monkeypatch):
    monkeypatch.setattr("tiktoken_ext.openai_public.load_tiktoken_bpe", lambda *_, **__: {})
    assert ENCODING_CONSTRUCTORS["cl100k_base"]()["pat_str"] == CL100K


def test_ids_are_those_of_encode_ordinary(folder, ranks):
    ours = load_tokenizer(str(folder / "tokenizer.model"))
    theirs = tiktoken.Encoding(
        "test", pat_str=CL100K, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": len(ranks)}
    )
    assert isinstance(ours, TiktokenTokenizer)
    for text in TRICKY:
        ids = ours.encode(text)
        assert ids == theirs.encode_ordinary(text) and ours.eod not in ids
        assert b"".join(ours.token_bytes[i] for i in ids) == text.encode()
        assert ours.decode(ids) == text
    assert ours.encode_batch(TRICKY) == [ours.encode(text) for text in TRICKY]
    assert (ours.eod, ours.vocab_size) == (len(ranks), theirs.n_vocab)
    assert ours.bytes_per_token()[ours.eod] == 0
    with pytest.raises(ValueError, match="lone surrogate"):
        ours.encode("\ud800")


def test_rendered_text_gives_special_tokens_and_where_ids_begin(folder):
    tokenizer = load_tokenizer(str(folder))
    ids, starts = tokenizer.encode_rendered(RENDERED)
    assert ids[-1] == tokenizer.eod and starts[-1] == RENDERED.index("<|endoftext|>")
    pieces = [RENDERED[a:b] for a, b in zip(starts, [*starts[1:], len(RENDERED)], strict=True)]
    assert "".join(pieces) == RENDERED
    character_of = [i for i, character in enumerate(RENDERED) for _ in character.encode()]
    byte = 0
    for i, start in zip(ids, starts, strict=True):
        assert start == character_of[byte]
        byte += len(tokenizer.token_bytes[i])


def test_files_and_pickles_give_the_same(folder, ranks, tmp_path):
    plain = load_tokenizer(str(folder))
    special = TiktokenTokenizer(ranks, "other", r"\S+|\s+", {"</s>": 1000}, {"chat_template.jinja": b"t"})
    for number, tokenizer in enumerate((plain, special)):
        target = tmp_path / str(number)
        target.mkdir()
        for name, content in tokenizer.files().items():
            (target / name).write_bytes(content)
        for again in (load_tokenizer(str(target)), pickle.loads(pickle.dumps(tokenizer))):
            assert again.fingerprint == tokenizer.fingerprint and again.eod == tokenizer.eod
            assert again.encode(TRICKY[3]) == tokenizer.encode(TRICKY[3])
            assert again.chat_template == tokenizer.chat_template
    assert plain.fingerprint != special.fingerprint and special.vocab_size == 1001
    alone = tmp_path / "llama.tiktoken"
    alone.write_bytes((folder / "tokenizer.model").read_bytes())
    assert load_tokenizer(str(alone)).fingerprint == plain.fingerprint
    (tmp_path / "1" / "megatsp_tokenizer.json").write_text('{"type": "tiktoken", "pattern": "x"}')
    with pytest.raises(ValueError, match="is damaged: 'special_tokens' is missing"):
        load_tokenizer(str(tmp_path / "1"))


def test_an_encoding_by_name_comes_from_the_cache(folder, monkeypatch, tmp_path):
    url = "https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken"
    content = (folder / "tokenizer.model").read_bytes()
    (tmp_path / hashlib.sha1(url.encode()).hexdigest()).write_bytes(content)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("tiktoken.load.check_hash", lambda *_: True)
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    monkeypatch.setattr("tiktoken.core.Encoding.n_vocab", 50257)
    constructor = ENCODING_CONSTRUCTORS["r50k_base"]
    small = {"explicit_n_vocab": None}
    monkeypatch.setitem(ENCODING_CONSTRUCTORS, "r50k_base", lambda: {**constructor(), **small})
    monkeypatch.setattr("tiktoken.registry.ENCODING_CONSTRUCTORS", ENCODING_CONSTRUCTORS)
    tokenizer = load_tokenizer("tiktoken:r50k_base")
    assert tokenizer.name == "tiktoken:r50k_base" and tokenizer.eod == 50256
    assert tokenizer.decode(tokenizer.encode(TRICKY[3])) == TRICKY[3]


def test_an_encoding_that_cannot_be_had(monkeypatch, tmp_path):
    def refuse(*_: object) -> bytes:
        raise ConnectionError("no network")

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("tiktoken.load.read_file", refuse)
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    with pytest.raises(ValueError, match=r"cannot get tiktoken:cl100k_base: no network.*TIKTOKEN_CACHE_DIR"):
        named("cl100k_base")
    with pytest.raises(ValueError, match=r"no encoding 'cl100k'; did you mean cl100k_base\?.*o200k_base"):
        load_tokenizer("tiktoken:cl100k")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"IQ== 0\nno line\n", r"line 2: b'no line' is no line of a tiktoken file"),
        (b"IQ== 0\nIg== 0\n", "gives one number to several tokens"),
        (b"IQ== 0\nIg== 1\n", "has no rank for 254 of the 256 bytes, as 0x00"),
    ],
)
def test_broken_files_are_named(tmp_path, content, message):
    (tmp_path / "x.tiktoken").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(str(tmp_path / "x.tiktoken"))
