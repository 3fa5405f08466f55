import math
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from megatsp.data import bigram
from megatsp.data.bigram import PRIOR, bits_per_byte, stream_counts
from megatsp.data.dataset import GPTDataset
from megatsp.data.indexed import IndexedWriter
from megatsp.data.tokenizer import ByteTokenizer, Tokenizer, train_bpe

TEXTS = [f"def f{i}(x):\n    return x * {i}  # é\n" * (1 + i % 3) for i in range(12)]


def prepare(prefix: Path, tokenizer: Tokenizer, seq_length: int = 9) -> tuple[GPTDataset, GPTDataset]:
    with IndexedWriter(prefix, tokenizer) as writer:
        for i, text in enumerate(TEXTS):
            writer.add(f"{i}.py", tokenizer.encode(text), len(text.encode()))
    train, valid = (GPTDataset(prefix, split, seq_length, tokenizer, 0.3, 1) for split in ("train", "valid"))
    return train, valid


def symbols_of(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    return [symbol for i in ids for symbol in (tokenizer.token_bytes[i] or [256])]


def brute_force(train: GPTDataset, valid: GPTDataset, num_samples: int) -> float:
    tokenizer = train.tokenizer
    stream = [256, *symbols_of(tokenizer, train.stream(0, train.num_tokens).tolist())]
    pairs = Counter(pairwise(stream))
    contexts, unigrams = Counter(stream[:-1]), Counter(stream[1:])
    bits, num_bytes = 0.0, 0
    for i in valid.spread(num_samples):
        sample = valid.sample(i).tolist()
        a = symbols_of(tokenizer, sample[:1])[-1]
        for b in symbols_of(tokenizer, sample[1:]):
            unigram = (unigrams[b] + 1) / (len(stream) - 1 + 257)
            bits -= math.log2((pairs[a, b] + PRIOR * unigram) / (contexts[a] + PRIOR))
            num_bytes += b != 256
            a = b
    return bits / num_bytes


def tokenizer_named(name: str, folder: Path) -> Tokenizer:
    return ByteTokenizer() if name == "byte" else train_bpe(TEXTS, 280, folder / "tokenizer.json")


@pytest.mark.parametrize("name", ["byte", "bpe"])
@pytest.mark.parametrize("chunk", [1, 7, 1 << 18])
def test_equals_brute_force(tmp_path: Path, name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bigram, "CHUNK_TOKENS", chunk)
    train, valid = prepare(tmp_path / "data", tokenizer_named(name, tmp_path))
    for num_samples in (1, 2, len(valid)):
        expected = brute_force(train, valid, num_samples)
        assert bits_per_byte(train, valid, num_samples) == pytest.approx(expected, rel=1e-12)
    assert bits_per_byte(train, valid) == bits_per_byte(train, valid, len(valid))


@pytest.mark.parametrize("name", ["byte", "bpe"])
def test_counts_are_of_the_training_bytes(tmp_path: Path, name: str) -> None:
    train, valid = prepare(tmp_path / "data", tokenizer_named(name, tmp_path))
    counts = sum(stream_counts(data) for data in (train, valid))
    assert counts[:, :256].sum() == train.info.bytes == len("".join(TEXTS).encode())
    assert counts[:, 256].sum() == len(TEXTS)


def test_probabilities_sum_to_one_and_are_positive(tmp_path: Path) -> None:
    train, _ = prepare(tmp_path / "data", ByteTokenizer())
    probabilities = bigram._conditional(stream_counts(train))
    assert probabilities.sum(axis=1) == pytest.approx(1.0, rel=1e-12)
    assert probabilities.min() > 0


@pytest.mark.parametrize("num_samples", [0, -1, 10**6])
def test_samples_that_do_not_exist(tmp_path: Path, num_samples: int) -> None:
    train, valid = prepare(tmp_path / "data", ByteTokenizer())
    with pytest.raises(ValueError, match=f"num_samples is {num_samples}"):
        bits_per_byte(train, valid, num_samples)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, valid = prepare(tmp_path / "data", ByteTokenizer())
    arguments = [
        "--data",
        str(tmp_path / "data"),
        "--tokenizer",
        "byte",
        "--seq-length",
        "9",
        "--samples",
        "3",
    ]
    bigram.main([*arguments, "--valid-fraction", "0.3", "--seed", "1"])
    assert capsys.readouterr().out == f"{bits_per_byte(train, valid, 3):.4f}\n"
    with pytest.raises(SystemExit, match="2"):
        bigram.main(["--data", str(tmp_path / "nothing")])
    assert "nothing.bin is missing" in capsys.readouterr().err
