"""The byte tokenizer, and which tokenizer a name stands for."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from texts import RENDERED, TRICKY

from megatsp.data.tokenizer import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    from_megatron,
    load_tokenizer,
    train_bpe,
)


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> HuggingFaceTokenizer:
    return train_bpe(TRICKY, 300, tmp_path_factory.mktemp("bpe") / "tokenizer.json")


def test_byte_tokenizer():
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("aß") == [97, 0xC3, 0x9F]
    assert [ids.tolist() for ids in tokenizer.encode_batch(["a", ""])] == [[97], []]
    assert tokenizer.decode([97, 0xC3, 0x9F, 256]) == "aß"
    assert tokenizer.decode([97, 0xC3]) == "a\ufffd"
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.special_tokens) == (
        257,
        256,
        {"<|endoftext|>": 256},
    )
    assert tokenizer.bytes_per_token().tolist() == [1] * 256 + [0]
    assert tokenizer.bytes_per_token().dtype == np.int64
    assert tokenizer.eod not in tokenizer.encode("<|endoftext|>")
    with pytest.raises(ValueError, match=r"character 2 of the text is the lone surrogate U\+DFFF"):
        tokenizer.encode("aß\udfff")


def test_rendered_bytes():
    tokenizer = ByteTokenizer()
    text = f"<|endoftext|>{RENDERED}ß"
    ids, starts = tokenizer.encode_rendered(text)
    assert [(i, s) for i, s in zip(ids, starts, strict=True) if i == 256] == [
        (256, 0),
        (256, 13 + RENDERED.index("<|endoftext|>")),
    ]
    assert ids[-2:] == list("ß".encode()) and starts[-2:] == [len(text) - 1] * 2
    assert "".join(text[a:b] for a, b in zip(starts, [*starts[1:], len(text)], strict=True)) == text


@pytest.mark.parametrize("ids", [[97, 257], [-1]])
def test_decode_refuses_unknown_ids(ids):
    with pytest.raises(ValueError, match=f"cannot decode id {ids[-1]}: byte has the ids 0 to 256"):
        ByteTokenizer().decode(ids)


def test_importing_tokenizers_is_cheap():
    heavy = ("torch", "transformers", "tokenizers", "sentencepiece", "tiktoken", "huggingface_hub")
    code = f"import sys, megatsp.data.tokenizer; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_byte_files_give_the_byte_tokenizer(tmp_path):
    for name, content in ByteTokenizer().files().items():
        (tmp_path / name).write_bytes(content)
    assert load_tokenizer(str(tmp_path)).fingerprint == load_tokenizer("byte").fingerprint


def test_a_folder_a_file_and_a_home_are_found(bpe, tmp_path, monkeypatch):
    (tmp_path / "tokenizer.json").write_bytes(bpe.files()["tokenizer.json"])
    (tmp_path / "tokenizer.model").write_text("of the slow tokenizer")
    for spec in (tmp_path, tmp_path / "tokenizer.json"):
        assert load_tokenizer(str(spec)).fingerprint == bpe.fingerprint
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_tokenizer("~/tokenizer.json").fingerprint == bpe.fingerprint


def write(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(b"no tokenizer")
    return folder


def test_what_is_not_there_is_named_with_what_is(bpe, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(bpe.files()["tokenizer.json"])
    cases = [
        (f"{tmp_path}/tokeniser.json", r"no tokenizer at .*tokeniser\.json; did you mean tokenizer\.json"),
        (f"{tmp_path}/absent", r"no tokenizer at .*absent; give 'byte', a tokenizer.json, .*gpt2-bpe:VOCAB"),
        ("bytes", r"no tokenizer at bytes; did you mean byte\?"),
        ("titoken:cl100k_base", r"did you mean tiktoken:\?"),
        ("hf:owner/name", "without hf: before it"),
        (str(write(tmp_path / "a")), "it holds no tokenizer.json, .*but nothing"),
        (str(write(tmp_path / "b", "readme.txt")), "but readme.txt"),
        (str(write(tmp_path / "c", "a.model", "b.tiktoken")), "several .*one of a.model, b.tiktoken"),
        (str(write(tmp_path / "d", "vocab.json", "merges.txt")), r"vocab.json, merges.txt but no "
         r"tokenizer.json: .*AutoTokenizer.*save_pretrained.*gpt2-bpe:.*/vocab.json,.*/merges.txt"),
        (str(write(tmp_path / "e", "vocab.txt")), r"vocab.txt but no .*save_pretrained\('.*/e'\)"),
        (f"{tmp_path}/c/a.model", "neither a tokenizer.json nor .* begins with b'no tokenizer'"),
        (f"{tmp_path}/d/vocab.json", "is a vocabulary without its merges: give gpt2-bpe:"),
        ("gpt2-bpe:vocab.json", "give two files"),
        (f"gpt2-bpe:{tmp_path}/absent.json,merges.txt", "cannot read .*absent.json of gpt2-bpe:.*No"),
    ]  # fmt: skip
    for spec, message in cases:
        with pytest.raises(ValueError, match=message):
            load_tokenizer(spec)


def test_a_hub_name_is_looked_up_by_its_library_alone(bpe, tmp_path, monkeypatch):
    asked = []

    def snapshot(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    with pytest.raises(ValueError, match="owner/name has no tokenizer.json: it is not a fast tokenizer"):
        load_tokenizer("owner/name")
    (tmp_path / "tokenizer.json").write_bytes(bpe.files()["tokenizer.json"])
    tokenizer = load_tokenizer("gpt2")
    assert (tokenizer.name, tokenizer.fingerprint) == ("gpt2", bpe.fingerprint)
    assert [name for name, _ in asked] == ["owner/name", "gpt2"]
    assert all(pattern.endswith((".json", ".jinja")) for _, patterns in asked for pattern in patterns)


def test_a_hub_that_does_not_answer(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))  # offline: see conftest.py
    with pytest.raises(ValueError, match=r"no tokenizer at owner/none: no such file.*hub did not give it"):
        load_tokenizer("owner/none")


def test_gpt2_vocabulary_and_merges(tmp_path):
    from transformers import GPT2Tokenizer

    content = json.loads(train_bpe(TRICKY, 300, tmp_path / "t.json").files()["tokenizer.json"])["model"]
    vocab = {token: i for i, token in enumerate([*list(content["vocab"])[1:], "<|endoftext|>"])}
    (tmp_path / "v.json").write_text(json.dumps(vocab))
    merges = "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in content["merges"]) + "\n"
    (tmp_path / "m.txt").write_text(merges)
    spec = from_megatron("GPT2BPETokenizer", None, str(tmp_path / "v.json"), str(tmp_path / "m.txt"))
    ours = load_tokenizer(spec)
    theirs = GPT2Tokenizer(vocab=vocab, merges=[tuple(pair) for pair in content["merges"]])
    for text in TRICKY:
        assert (
            ours.encode(text)
            == theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        )
        assert ours.decode(ours.encode(text)) == text
    assert (ours.eod, ours.vocab_size, ours.name) == (299, 300, spec)
    (tmp_path / "m.txt").write_text("no merges here")
    with pytest.raises(ValueError, match="is no vocabulary with its merges"):
        load_tokenizer(spec)


def test_megatrons_names(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"")
    model = str(path)
    assert from_megatron("HuggingFaceTokenizer", "meta-llama/Llama-2-7b") == "meta-llama/Llama-2-7b"
    assert from_megatron("PretrainedFromHF", "gpt2") == "gpt2"
    for name in ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer", "TikTokenizer"):
        assert from_megatron(name, model) == model
    assert from_megatron("TikTokenizer", "cl100k_base") == "tiktoken:cl100k_base"
    assert from_megatron("ByteLevelTokenizer") == "byte"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("NullTokenizer",), "reads numbers, not text"),
        (
            ("Llama2Tokeniser", "x"),
            r"unknown .*; did you mean Llama2Tokenizer\?.*\(known: HuggingFaceTokenizer, ",
        ),
        (("HuggingFaceTokenizer",), "HuggingFaceTokenizer needs --tokenizer-model"),
        (("GPT2BPETokenizer", None, "v"), "GPT2BPETokenizer needs --merge-file"),
        (("ByteLevelTokenizer", "x"), "does not take --tokenizer-model"),
        (("Llama2Tokenizer", "folder"), r"folder is no \*.model file"),
        (("TikTokenizer", "tekken.json"), "Megatron's own JSON of ranks, which is not read"),
    ],
)
def test_megatrons_options_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        from_megatron(*arguments)
