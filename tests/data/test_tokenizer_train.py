"""Training tokenizers: the function, and `megatsp preprocess train-tokenizer`."""

import json
from pathlib import Path

import pytest
from runs import files
from texts import CORPUS, TRICKY

from megatsp.data.tokenizer import load_tokenizer, train_bpe
from megatsp.data.tokenizer.train import main

NAMES = {"tokenizer.json", "tokenizer_config.json"}


def test_bpe_training_is_exact_deterministic_and_leaves_one_file(tmp_path):
    bpe = train_bpe(CORPUS, 300, tmp_path / "a" / "tokenizer.json")
    again = train_bpe(CORPUS, 300, tmp_path / "b" / "tokenizer.json")
    assert again.fingerprint == bpe.fingerprint
    assert load_tokenizer(str(tmp_path / "a")).fingerprint == bpe.fingerprint
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["tokenizer.json"]
    assert (bpe.vocab_size, bpe.eod, bpe.bytes_per_token()[bpe.eod]) == (300, 0, 0)
    assert {token for token in bpe.token_bytes if len(token) == 1} == {bytes([i]) for i in range(256)}
    for text in TRICKY:
        assert bpe.decode(bpe.encode(text)) == text and bpe.eod not in bpe.encode(text)


@pytest.mark.parametrize(
    ("vocab_size", "message"), [(256, "needs 257"), (100000, r"only give \d+ tokens: lower")]
)
def test_impossible_vocabulary_size(tmp_path, vocab_size, message):
    with pytest.raises(ValueError, match=message):
        train_bpe(TRICKY, vocab_size, tmp_path / "tokenizer.json")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A file of JSON lines."""
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text or "empty", "n": 1}) + "\n" for text in CORPUS))
    return path


def command(corpus: Path, output: Path, *more: str, vocab_size: int = 400) -> list[str]:
    return ["--input", str(corpus), "--output", str(output), "--vocab-size", str(vocab_size), *more]


@pytest.mark.parametrize("model", ["bpe", "unigram"])
def test_the_command_writes_what_transformers_reads(corpus, tmp_path, capsys, model):
    from transformers import AutoTokenizer

    output = tmp_path / "new" / "tokenizer"
    specials = ["<|im_start|>", "<|im_end|>"]
    assert main(command(corpus, output, "--model", model, "--special-tokens", *specials)) == 0
    assert {path.name for path in output.iterdir()} == NAMES
    ours, theirs = load_tokenizer(str(output)), AutoTokenizer.from_pretrained(output)
    assert (ours.vocab_size, ours.eod) == (400, 0) == (len(theirs), theirs.eos_token_id)
    assert ours.special_tokens == {"<|endoftext|>": 0, specials[0]: 1, specials[1]: 2}
    assert set(theirs.all_special_tokens) == set(ours.special_tokens)
    num_tokens = num_bytes = 0
    for text in TRICKY:
        ids = ours.encode(text)
        assert ids == theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert ours.encode_rendered(text)[0] == theirs(text, add_special_tokens=False)["input_ids"]
        assert b"".join(ours.token_bytes[i] for i in ids) == text.encode()
        assert ours.decode(ids) == text and not {0, 1, 2} & set(ids)
    printed = capsys.readouterr()
    for text in CORPUS:
        num_tokens += len(ours.encode(text or "empty"))
        num_bytes += len((text or "empty").encode())
    assert (
        f"{num_bytes / num_tokens:.3f} bytes per token on the first {num_bytes:,} of these bytes"
        in printed.out
    )
    assert f"use: data.tokenizer={output} model.vocab_size=400" in printed.out
    assert f"training on {len(CORPUS)} documents, {num_bytes:,} bytes" in printed.err


def test_limits_and_frequency(corpus, tmp_path, capsys):
    def trained(*more: str) -> str:
        main(command(corpus, tmp_path / "out", "--force", *more, vocab_size=300))
        lines = capsys.readouterr().out
        return lines[lines.index("trained on") :].split("\n")[0]

    size = len(CORPUS[0].encode())
    assert trained("--limit-documents", "1") == (
        f"trained on 1 documents, {size:,} bytes, up to --limit-documents"
    )
    first = load_tokenizer(str(tmp_path / "out")).fingerprint
    assert trained("--limit-bytes", str(size + 1)).endswith(f"{size:,} bytes, up to --limit-bytes")
    assert load_tokenizer(str(tmp_path / "out")).fingerprint == first
    assert trained("--limit-documents", "1000").endswith("bytes")
    assert load_tokenizer(str(tmp_path / "out")).fingerprint != first
    with pytest.raises(ValueError, match=r"these texts only give \d+ tokens"):
        trained("--min-frequency", "100000")
    with pytest.raises(ValueError, match="the input holds no text that fits into --limit-bytes"):
        trained("--limit-bytes", "1")


def test_output_appears_whole_or_not_at_all(corpus, tmp_path):
    output = tmp_path / "out"
    main(command(corpus, output))
    before = files(output)
    with pytest.raises(ValueError, match="holds a tokenizer: --force replaces it"):
        main(command(corpus, output, vocab_size=300))
    with pytest.raises(ValueError, match="only give"):
        main(command(corpus, output, "--force", vocab_size=10**6))
    assert files(output) == before
    main(command(corpus, output, "--force", vocab_size=300))
    assert load_tokenizer(str(output)).vocab_size == 300
    (output / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other files, such as notes.txt"):
        main(command(corpus, output, "--force"))
    with pytest.raises(ValueError, match="is there and is no folder"):
        main(command(corpus, corpus, "--force"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.jsonl", "out"]


def test_a_folder_that_holds_other_files_too(corpus, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "README.md").write_text("not data")
    corpus.rename(folder / corpus.name)
    with pytest.raises(ValueError, match="--input-type jsonl, parquet or text"):
        main(command(folder, tmp_path / "out"))
    assert main(command(folder, tmp_path / "out", "--input-type", "jsonl")) == 0


def test_a_bad_record_fails_or_is_skipped(corpus, tmp_path):
    corpus.write_text(corpus.read_text() + '{"other": "x"}\n')
    with pytest.raises(ValueError, match=f"line {len(CORPUS) + 1}: missing key text"):
        main(command(corpus, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    assert main(command(corpus, tmp_path / "out", "--on-error", "skip")) == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--min-frequency", "2", "--model", "unigram"],
            "--min-frequency goes with --model bpe, not with unigram",
        ),
        (["--limit-bytes", "0"], "--limit-bytes 0: must be at least 1"),
        (["--special-tokens", "<a>", "<a>"], "--special-tokens: <a> is there twice"),
        (["--special-tokens", ""], "--special-tokens: one is empty"),
        (["--model", "word"], r"invalid choice: 'word'.*train-tokenizer --help lists"),
        (["--vocab-size", "257", "--special-tokens", "<a>"], r"needs 258, .*\(<\|endoftext\|>, <a>\)"),
    ],
)
def test_arguments_that_make_no_sense(corpus, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        main(command(corpus, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()
