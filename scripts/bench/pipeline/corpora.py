"""Synthetic corpora: documents of log-normal length, random ids."""

import os
from pathlib import Path

import numpy as np

from megatsp.data.index_file import DTYPE_OF_CODE, token_code, write_index
from megatsp.data.indexed import IndexedWriter
from megatsp.data.tokenizer import ByteTokenizer
from megatsp.schema import Config, DataConfig, ModelConfig, TrainerConfig

VOCAB_SIZE = 50304
MEDIAN_TOKENS, SPREAD = 400, 1.2  # a mean of about 820, as of web pages


def sizes(count: int, seed: int) -> np.ndarray:
    """Tokens of documents, int32."""
    drawn = np.random.default_rng(seed).lognormal(np.log(MEDIAN_TOKENS), SPREAD, count)
    return np.maximum(drawn, 2).astype("<i4")


def write_pair(prefix: Path, documents: int, seed: int, sparse: bool = False) -> int:
    """A .bin/.idx pair as Megatron's, without a .json; returns its tokens. sparse: ids are 0, on no disk."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    of_documents, code = sizes(documents, seed), token_code(VOCAB_SIZE)
    scratch = prefix.with_suffix(".sizes")
    of_documents.tofile(scratch)
    _, tokens, _ = write_index(f"{prefix}.idx", str(scratch), code)
    scratch.unlink()
    with open(f"{prefix}.bin", "wb") as file:
        if sparse:
            os.truncate(file.fileno(), tokens * np.dtype(DTYPE_OF_CODE[code]).itemsize)
        else:
            generator = np.random.default_rng(seed)
            generator.integers(0, VOCAB_SIZE, tokens).astype(DTYPE_OF_CODE[code]).tofile(file)
    return tokens


def write_described(prefix: Path, documents: int, seed: int) -> None:
    """As `megatsp preprocess` leaves it, with a .json; bytes."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    with IndexedWriter(prefix, ByteTokenizer()) as writer:
        for size in sizes(documents, seed).tolist():
            writer.add("synthetic", generator.integers(0, 256, size - 1), size)


def configuration(paths: list[str], seq_length: int, **data: object) -> Config:
    """Of a run on these sources; 5% are held out."""
    return Config(
        data=DataConfig(path=paths, **data),  # type: ignore[arg-type]
        trainer=TrainerConfig(seq_length=seq_length),
        model=ModelConfig(vocab_size=VOCAB_SIZE),
    )
