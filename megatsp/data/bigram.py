"""A byte-bigram language model: the bits per byte that a trained model must beat.

    python -m megatsp.data.bigram --data PREFIX --tokenizer byte --seq-length 256

The model is the training split's bigram counts, interpolated with its unigram counts by a Dirichlet prior:

    p(b | a) = (count(a, b) + PRIOR * p(b)) / (count(a) + PRIOR),   p(b) = (count(b) + 1) / (total + 257)

over 257 symbols, the bytes and eod. PRIOR is a constant, never fitted. Like a trained model's loss, the score
includes the cost of predicting each eod, while only bytes are counted in the denominator.
"""

import argparse
from collections.abc import Sequence

import numpy as np

from megatsp.data.blend import Blend, Draw
from megatsp.data.splits import load_splits
from megatsp.data.tokenizer import Tokenizer, load_tokenizer
from megatsp.schema import Config, DataConfig, ModelConfig, TrainerConfig

PRIOR = 16.0  # pseudo-counts
EOD = 256
SYMBOLS = 257
CHUNK_TOKENS = 1 << 18  # bounds the memory of counting


def bits_per_byte(train: Blend, valid: Blend, tokenizer: Tokenizer, num_samples: int | None = None) -> float:
    """Fit on all documents of the training split and score the trained labels of validation samples.

    Those are the labels that a model's evaluation on as many samples is scored on (`Blend.spread`), byte for
    byte: a BPE token is scored as its bytes.

    Args:
        num_samples: None scores every sample of the validation split.

    Returns:
        bits per UTF-8 byte.

    Raises:
        ValueError: num_samples is not from 1 to len(valid), or the tokenizer's ids have no exact bytes.
    """
    num_samples = len(valid) if num_samples is None else num_samples
    if not 1 <= num_samples <= len(valid):
        raise ValueError(f"num_samples is {num_samples}; the validation split has 1 to {len(valid)}")
    bits = -np.log2(_conditional(document_counts(train, tokenizer)))
    counts = sample_counts(valid, valid.spread(num_samples), tokenizer)
    num_bytes = counts[:, :EOD].sum()
    if num_bytes == 0:
        raise ValueError(f"{num_samples} validation samples hold no bytes; score more of them")
    return float((counts * bits).sum() / num_bytes)


def document_counts(blend: Blend, tokenizer: Tokenizer) -> np.ndarray:
    """How often symbol b follows symbol a in a split's documents, int64 [257, 257] as [a, b].

    What precedes a document is taken to be eod.
    """
    table, counts = _SymbolTable(tokenizer), np.zeros((SYMBOLS, SYMBOLS), dtype=np.int64)
    eod = np.array([tokenizer.eod])
    for source in blend.sources:
        for tokens in source.samples.documents():
            for begin in range(0, len(tokens), CHUNK_TOKENS):
                context = tokens[begin - 1 : begin] if begin else eod
                part = np.concatenate([context, tokens[begin : begin + CHUNK_TOKENS]])
                counts += table.pairs(part[:-1], part[1:])
    return counts


def sample_counts(blend: Blend, draws: Sequence[Draw], tokenizer: Tokenizer) -> np.ndarray:
    """The same over the trained labels of these samples."""
    table, counts = _SymbolTable(tokenizer), np.zeros((SYMBOLS, SYMBOLS), dtype=np.int64)
    for draw in draws:
        sample = blend.sample(draw)
        trained = sample.mask > 0
        counts += table.pairs(sample.tokens[trained], sample.labels[trained])
    return counts


class _SymbolTable:
    """Maps token ids to the symbols that they stand for; a special token stands for eod."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        if tokenizer.token_bytes is None:
            raise ValueError(
                f"the ids of {tokenizer.name} stand for no exact bytes, which a byte bigram needs"
            )
        symbols = [list(b) or [EOD] for b in tokenizer.token_bytes]
        self._lengths = np.array([len(s) for s in symbols], dtype=np.int64)
        self._starts = np.cumsum(self._lengths) - self._lengths
        self._flat = np.array([symbol for s in symbols for symbol in s], dtype=np.int64)

    def pairs(self, tokens: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Counts [257, 257] of the labels' symbols after what precedes each: labels[i] follows tokens[i]."""
        lengths = self._lengths[labels]
        starts = np.cumsum(lengths) - lengths
        symbols = self._flat[np.arange(lengths.sum()) + np.repeat(self._starts[labels] - starts, lengths)]
        contexts = np.roll(symbols, 1)
        contexts[starts] = self._flat[self._starts[tokens] + self._lengths[tokens] - 1]
        pairs = np.bincount(contexts * SYMBOLS + symbols, minlength=SYMBOLS * SYMBOLS)
        return pairs.reshape(SYMBOLS, SYMBOLS)


def _conditional(counts: np.ndarray) -> np.ndarray:
    """p(b | a), float64 [257, 257] as [a, b]; every row sums to one and no entry is zero."""
    unigram = (counts.sum(axis=0) + 1.0) / (counts.sum() + SYMBOLS)
    return (counts + PRIOR * unigram) / (counts.sum(axis=1, keepdims=True) + PRIOR)


def main(arguments: list[str] | None = None) -> None:
    """Print the bits per byte for the data that the command line names."""
    parser = argparse.ArgumentParser(
        prog="python -m megatsp.data.bigram",
        description="Bits per byte, on the validation split, of a byte bigram fitted on the training split.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--data", required=True, metavar="PREFIX", help="prefix of the .bin, .idx and .json")
    parser.add_argument("--tokenizer", default="byte", help="'byte', a tokenizer.json or its folder")
    parser.add_argument("--seq-length", type=int, default=TrainerConfig.seq_length, help="tokens of a sample")
    parser.add_argument("--samples", type=int, help="validation samples to score, evenly spread; none: all")
    parser.add_argument(
        "--valid-fraction", type=float, default=DataConfig.valid_fraction, help="as in training"
    )
    parser.add_argument("--seed", type=int, default=TrainerConfig.seed, help="as in training")
    options = parser.parse_args(arguments)
    try:
        tokenizer = load_tokenizer(options.tokenizer)
        config = Config(
            data=DataConfig(path=[options.data], valid_fraction=options.valid_fraction),
            trainer=TrainerConfig(seq_length=options.seq_length, seed=options.seed),
            model=ModelConfig(vocab_size=tokenizer.vocab_size),
        )
        splits = load_splits(config, tokenizer)
        if splits.valid is None:
            raise ValueError("--valid-fraction 0 holds no validation documents out")
        print(f"{bits_per_byte(splits.train, splits.valid, tokenizer, options.samples):.4f}")
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
