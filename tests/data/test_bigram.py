import math
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from megatsp.data import bigram
from megatsp.data.bigram import PRIOR, bits_per_byte, document_counts
from megatsp.data.indexed import IndexedWriter
from megatsp.data.splits import Splits, load_splits
from megatsp.data.tokenizer import ByteTokenizer, Tokenizer, train_bpe
from megatsp.schema import Config, DataConfig, ModelConfig, TrainerConfig

TEXTS = [f"def f{i}(x):\n    return x * {i}  # é\n" * (1 + i % 3) for i in range(12)]


def prepare(prefix: Path, tokenizer: Tokenizer, **data) -> Splits:
    with IndexedWriter(prefix, tokenizer) as writer:
        for i, text in enumerate(TEXTS):
            writer.add(f"{i}.py", tokenizer.encode(text), len(text.encode()))
    config = Config(
        data=DataConfig(path=[str(prefix)], valid_fraction=0.3, **data),
        trainer=TrainerConfig(seq_length=9, seed=1),
        model=ModelConfig(vocab_size=tokenizer.vocab_size),
    )
    return load_splits(config, tokenizer)


def symbols_of(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    assert tokenizer.token_bytes is not None
    return [symbol for i in ids for symbol in (tokenizer.token_bytes[i] or [256])]


def brute_force(data: Splits, tokenizer: Tokenizer, num_samples: int) -> float:
    stream = [256]  # every document ends with one, and so begins after one
    for tokens in data.train.sources[0].samples.documents():
        stream += symbols_of(tokenizer, tokens.tolist())
    pairs = Counter(pairwise(stream))
    contexts, unigrams = Counter(stream[:-1]), Counter(stream[1:])
    bits, num_bytes = 0.0, 0
    for draw in data.valid.spread(num_samples):
        sample = data.valid.sample(draw)
        for token, label, trained in zip(*(column.tolist() for column in sample[:3]), strict=True):
            a = symbols_of(tokenizer, [token])[-1]
            for b in symbols_of(tokenizer, [label]) if trained else []:
                unigram = (unigrams[b] + 1) / (len(stream) - 1 + 257)
                bits -= math.log2((pairs[a, b] + PRIOR * unigram) / (contexts[a] + PRIOR))
                num_bytes += b != 256
                a = b
    return bits / num_bytes


def tokenizer_named(name: str, folder: Path) -> Tokenizer:
    return ByteTokenizer() if name == "byte" else train_bpe(TEXTS, 280, folder / "tokenizer.json")


@pytest.mark.parametrize("name", ["byte", "bpe"])
@pytest.mark.parametrize("packing", ["concat", "best_fit"])
@pytest.mark.parametrize("chunk", [1, 7, 1 << 18])
def test_equals_brute_force(tmp_path, name, packing, chunk, monkeypatch):
    monkeypatch.setattr(bigram, "CHUNK_TOKENS", chunk)
    tokenizer = tokenizer_named(name, tmp_path)
    data = prepare(tmp_path / "data", tokenizer, packing=packing)
    for num_samples in (1, 2, len(data.valid)):
        expected = brute_force(data, tokenizer, num_samples)
        assert bits_per_byte(data.train, data.valid, tokenizer, num_samples) == pytest.approx(
            expected, rel=1e-12
        )
    assert bits_per_byte(data.train, data.valid, tokenizer) == bits_per_byte(
        data.train, data.valid, tokenizer, len(data.valid)
    )


@pytest.mark.parametrize("name", ["byte", "bpe"])
def test_counts_are_of_the_training_bytes(tmp_path, name):
    tokenizer = tokenizer_named(name, tmp_path)
    data = prepare(tmp_path / "data", tokenizer)
    counts = sum(document_counts(blend, tokenizer) for blend in (data.train, data.valid))
    assert counts[:, :256].sum() == len("".join(TEXTS).encode())
    assert counts[:, 256].sum() == len(TEXTS)


def test_probabilities_sum_to_one_and_are_positive(tmp_path):
    data = prepare(tmp_path / "data", ByteTokenizer())
    probabilities = bigram._conditional(document_counts(data.train, ByteTokenizer()))
    assert probabilities.sum(axis=1) == pytest.approx(1.0, rel=1e-12)
    assert probabilities.min() > 0


@pytest.mark.parametrize("num_samples", [0, -1, 10**6])
def test_samples_that_do_not_exist(tmp_path, num_samples):
    data = prepare(tmp_path / "data", ByteTokenizer())
    with pytest.raises(ValueError, match=f"num_samples is {num_samples}"):
        bits_per_byte(data.train, data.valid, ByteTokenizer(), num_samples)


def test_command_line(tmp_path, capsys):
    data = prepare(tmp_path / "data", ByteTokenizer())
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
    assert capsys.readouterr().out == f"{bits_per_byte(data.train, data.valid, ByteTokenizer(), 3):.4f}\n"
    with pytest.raises(SystemExit, match="2"):
        bigram.main(["--data", str(tmp_path / "nothing")])
    assert "nothing.bin is missing" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        bigram.main([*arguments, "--valid-fraction", "0"])
    assert "holds no validation documents out" in capsys.readouterr().err
