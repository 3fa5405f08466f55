"""A byte-bigram language model: the bits per byte that a trained model must beat.

    python -m megatsp.data.bigram --data PREFIX --tokenizer byte --seq-length 256

The model is the training split's bigram counts, interpolated with its unigram counts by a Dirichlet prior:

    p(b | a) = (count(a, b) + PRIOR * p(b)) / (count(a) + PRIOR),   p(b) = (count(b) + 1) / (total + 257)

over 257 symbols, the bytes and eod. PRIOR is a constant, never fitted. Like a trained model's loss, the score
includes the cost of predicting each eod, while only bytes are counted in the denominator.
"""

import argparse

import numpy as np

from megatsp.data.dataset import GPTDataset
from megatsp.data.tokenizer import Tokenizer, load_tokenizer
from megatsp.schema import DataConfig, TrainerConfig

PRIOR = 16.0  # pseudo-counts
EOD = 256
SYMBOLS = 257
CHUNK_TOKENS = 1 << 18  # bounds the memory of counting


def bits_per_byte(
    train_dataset: GPTDataset, valid_dataset: GPTDataset, num_samples: int | None = None
) -> float:
    """Fit on the whole training stream and score the labels of validation samples.

    Those are the labels that a model's evaluation on as many samples is scored on (`GPTDataset.spread`),
    byte for byte: a BPE token is scored as its bytes.

    Args:
        num_samples: None scores every sample of the validation split.

    Returns:
        bits per UTF-8 byte.

    Raises:
        ValueError: num_samples is not from 1 to len(valid_dataset).
    """
    num_samples = len(valid_dataset) if num_samples is None else num_samples
    if not 1 <= num_samples <= len(valid_dataset):
        raise ValueError(f"num_samples is {num_samples}; the validation split has 1 to {len(valid_dataset)}")
    bits = -np.log2(_conditional(stream_counts(train_dataset)))
    counts = sample_counts(valid_dataset, valid_dataset.spread(num_samples))
    num_bytes = counts[:, :EOD].sum()
    if num_bytes == 0:
        raise ValueError(f"{num_samples} validation samples hold no bytes; score more of them")
    return float((counts * bits).sum() / num_bytes)


def stream_counts(dataset: GPTDataset) -> np.ndarray:
    """How often symbol b follows symbol a in a split's stream, int64 [257, 257] as [a, b].

    What precedes the stream is taken to be eod.
    """
    table, counts, context = _SymbolTable(dataset.tokenizer), _no_counts(), EOD
    for begin in range(0, dataset.num_tokens, CHUNK_TOKENS):
        symbols = table.symbols(dataset.stream(begin, min(begin + CHUNK_TOKENS, dataset.num_tokens)))
        counts += _pairs(context, symbols)
        context = int(symbols[-1])
    return counts


def sample_counts(dataset: GPTDataset, indices: np.ndarray) -> np.ndarray:
    """The same over the labels of these samples; a sample's first token is context alone."""
    table, counts = _SymbolTable(dataset.tokenizer), _no_counts()
    for index in indices:
        tokens = dataset.sample(int(index))
        counts += _pairs(int(table.symbols(tokens[:1])[-1]), table.symbols(tokens[1:]))
    return counts


def _no_counts() -> np.ndarray:
    return np.zeros((SYMBOLS, SYMBOLS), dtype=np.int64)


def _pairs(context: int, symbols: np.ndarray) -> np.ndarray:
    contexts = np.concatenate(([context], symbols[:-1]))
    pairs = np.bincount(contexts * SYMBOLS + symbols, minlength=SYMBOLS * SYMBOLS)
    return pairs.reshape(SYMBOLS, SYMBOLS)


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

    def symbols(self, ids: np.ndarray) -> np.ndarray:
        lengths = self._lengths[ids]
        ends = np.cumsum(lengths)
        shifts = np.repeat(self._starts[ids] - (ends - lengths), lengths)
        return self._flat[np.arange(ends[-1]) + shifts]


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
        train, valid = (
            GPTDataset(
                options.data, split, options.seq_length, tokenizer, options.valid_fraction, options.seed
            )
            for split in ("train", "valid")
        )
        print(f"{bits_per_byte(train, valid, options.samples):.4f}")
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
