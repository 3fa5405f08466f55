"""SentencePiece models: the library's ids, whose control symbols no text gives."""

import hashlib
import io
import pickle
from pathlib import Path

import pytest
import sentencepiece
from texts import CORPUS, TRICKY

from megatsp.data.tokenizer import SentencePieceTokenizer, load_tokenizer

CONTROL = ["<|im_start|>", "<|im_end|>"]


def train(kind: str = "bpe", byte_fallback: bool = True, **settings: object) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(CORPUS[:2]).split("\n")),
        model_writer=model,
        model_type=kind,
        vocab_size=500,
        byte_fallback=byte_fallback,
        control_symbols=CONTROL,
        user_defined_symbols=["<tag>"],
        minloglevel=2,
        **settings,
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "bpe.model").write_bytes(train())
    (folder / "unigram.model").write_bytes(train("unigram", byte_fallback=False, hard_vocab_limit=False))
    (folder / "no_eos.model").write_bytes(train(eos_id=-1))
    return folder


@pytest.mark.parametrize("name", ["bpe", "unigram"])
def test_ids_are_the_librarys(folder, name):
    path = folder / f"{name}.model"
    library, ours = sentencepiece.SentencePieceProcessor(model_file=str(path)), load_tokenizer(str(path))
    assert isinstance(ours, SentencePieceTokenizer)
    for text in (*TRICKY, "a<tag>b"):
        ids = ours.encode(text)
        assert ids == library.encode(text)
        assert not set(ids) & set(ours.special_tokens.values())
        assert ours.decode(ids) == library.decode(ids)
    assert ours.encode_batch(TRICKY) == [ours.encode(text) for text in TRICKY]
    assert ours.encode_batch([]) == []
    assert (ours.eod, ours.vocab_size) == (library.eos_id(), library.vocab_size())
    assert ours.special_tokens == {"<s>": 1, "</s>": 2, CONTROL[0]: 3, CONTROL[1]: 4}
    assert ours.encode("a<tag>b").count(library.piece_to_id("<tag>")) == 1  # text, as the library has it
    assert ours.fingerprint == hashlib.sha256(path.read_bytes()).hexdigest()


def test_bytes_are_of_the_normalised_text(folder):
    tokenizer = load_tokenizer(str(folder / "bpe.model"))
    for text, normalised in [("x日本 y", " x日本 y"), ("ﬁ  x ", " fi x"), ("<tag>", " <tag>")]:
        assert b"".join(tokenizer.token_bytes[i] for i in tokenizer.encode(text)) == normalised.encode()
        assert tokenizer.decode(tokenizer.encode(text)) == normalised[1:]
    assert tokenizer.bytes_per_token()[[0, 1, 2, 3]].tolist() == [0, 0, 0, 0]
    assert load_tokenizer(str(folder / "unigram.model")).token_bytes is None  # <unk> stands for any text
    with pytest.raises(ValueError, match="cannot decode id 500"):
        tokenizer.decode([500])


def test_rendered_text_gives_control_symbols_and_where_ids_begin(folder):
    tokenizer = load_tokenizer(str(folder / "bpe.model"))
    text = "<|im_start|>Über 日本🙂?<|im_end|>x</s>"
    ids, starts = tokenizer.encode_rendered(text)
    assert [(i, s) for i, s in zip(ids, starts, strict=True) if i in (1, 2, 3, 4)] == [
        (3, 0), (4, text.index("<|im_end")), (2, text.index("</s>")),
    ]  # fmt: skip
    pieces = [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]
    assert "".join(pieces) == text
    assert text[starts[ids.index(4) + 1] :].startswith("x</s>")
    assert tokenizer.encode("a日") == tokenizer.encode_rendered("a日")[0]


def test_files_and_pickles_give_the_same(folder, tmp_path):
    tokenizer = load_tokenizer(str(folder / "bpe.model"))
    for name, content in tokenizer.files().items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "chat_template.jinja").write_text("template")
    again = load_tokenizer(str(tmp_path))
    assert again.fingerprint == tokenizer.fingerprint and again.chat_template == "template"
    assert again.files().keys() == {"tokenizer.model", "chat_template.jinja"}
    assert pickle.loads(pickle.dumps(tokenizer)).encode("abc") == tokenizer.encode("abc")


def test_what_cannot_be_used_is_named(folder, tmp_path):
    with pytest.raises(ValueError, match="has no end of sequence"):
        load_tokenizer(str(folder / "no_eos.model"))
    (tmp_path / "broken.model").write_bytes((folder / "bpe.model").read_bytes()[:200])
    with pytest.raises(ValueError, match=r"broken\.model is no SentencePiece model"):
        load_tokenizer(str(tmp_path / "broken.model"))
    tokenizer = load_tokenizer(str(folder / "bpe.model"))
    for encode in (tokenizer.encode, tokenizer.encode_rendered):
        with pytest.raises(ValueError, match="character 0 of the text is the lone surrogate"):
            encode("\ud800")
