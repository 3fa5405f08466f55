"""Small corpora whose tokens say where they stand."""

from pathlib import Path

import numpy as np

from megatsp.data.blend import Blend
from megatsp.data.indexed import IndexedWriter
from megatsp.data.splits import Splits, load_splits
from megatsp.data.tokenizer import ByteTokenizer
from megatsp.schema import Config, DataConfig, ModelConfig, TrainerConfig

EOD = 256


def write(prefix: Path, sizes: list[int], roles: bool = False) -> Path:
    """Document i has sizes[i] > 1 tokens; each is of an input of its own, file i."""
    with IndexedWriter(prefix, ByteTokenizer(), roles=roles) as writer:
        for i, size in enumerate(sizes):
            kinds = np.array(roles_of(i, size)[:-1], np.uint8) if roles else None
            writer.add(f"file{i}", tokens_of(i, size)[:-1], size, kinds)
    return prefix


def tokens_of(document: int, size: int) -> list[int]:
    """i + 1, i + 2, ... modulo 251, and eod."""
    return [(document + 1 + i) % 251 for i in range(size - 1)] + [EOD]


def roles_of(document: int, size: int) -> list[int]:
    """Runs of 0, 1 and 2; eod has that of the token before."""
    roles = [(document + i // 3) % 3 for i in range(size - 1)]
    return roles + roles[-1:]


def some_sizes(count: int, seed: int = 0, largest: int = 200) -> list[int]:
    """Most short, a few long; at least two tokens each."""
    return np.random.RandomState(seed).lognormal(2.5, 1.2, count).clip(2, largest).astype(int).tolist()


def splits(
    path: str | list[str], seq_length: int = 16, seed: int = 5, vocab_size: int = 257, **data
) -> Splits:
    config = Config(
        data=DataConfig(path=[path] if isinstance(path, str) else path, **{"valid_fraction": 0.2, **data}),
        trainer=TrainerConfig(seq_length=seq_length, seed=seed),
        model=ModelConfig(vocab_size=vocab_size),
    )
    return load_splits(config, ByteTokenizer())


def train(prefix: Path, seq_length: int = 16, **more) -> Blend:
    return splits(str(prefix), seq_length, **more).train
