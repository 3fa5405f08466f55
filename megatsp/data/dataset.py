"""Which tokens a training step sees: documents to a stream, the stream to samples, samples to ranks.

Everything here is a pure function of the data, one seed and the number of samples consumed so far. No rank
count enters before `rank_slices`, so a run resumed at another data-parallel size goes on with the same
global batches.
"""

from pathlib import Path

import numpy as np
import torch

from megatsp.data.indexed import IndexedDocuments
from megatsp.data.tokenizer import Tokenizer

# What a seed is used for. Each use has a stream of its own, so one seed serves them all.
SPLIT, DOCUMENT_ORDER, SAMPLE_ORDER = range(3)


def split_documents(num_documents: int, valid_fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Document ids for training and for validation, int64 and ascending: disjoint, together all.

    Validation gets `valid_fraction` of the documents, rounded.

    Raises:
        ValueError: either part would be empty, or the seed is negative.
    """
    num_valid = round(num_documents * valid_fraction)
    if not 0 < num_valid < num_documents:
        raise ValueError(
            f"valid_fraction {valid_fraction} of {num_documents} documents holds out {num_valid}; both parts "
            "need a document: give more documents or another valid_fraction between 0 and 1"
        )
    order = _permutation(num_documents, seed, SPLIT)
    return np.sort(order[num_valid:]), np.sort(order[:num_valid])


class GPTDataset:
    """Samples of one split: its documents in a seeded order, concatenated, cut every `seq_length` tokens.

    Every document ends with eod. Sample i is stream[i*T : i*T + T + 1], so neighbours share one token, a
    label of the first and an input of the second; a tail too short for a sample is not used. Tokens are
    read through a memory map; only the lengths and names of documents are held in memory.

    Args:
        prefix: of the .bin, .idx and .json files.
        split: "train" or "valid".
        seq_length: T, in tokens.
        tokenizer: must be the one that the data was written with.
        valid_fraction: share of the documents that is held out.
        seed: of the split and of the order of documents.

    Raises:
        ValueError: unreadable data, another tokenizer's data, or a split with fewer than T + 1 tokens.
    """

    def __init__(
        self,
        prefix: str | Path,
        split: str,
        seq_length: int,
        tokenizer: Tokenizer,
        valid_fraction: float,
        seed: int,
    ) -> None:
        if split not in ("train", "valid"):
            raise ValueError(f"split is {split!r}; it must be 'train' or 'valid'")
        if seq_length < 1:
            raise ValueError(f"seq_length is {seq_length}; it must be at least 1")
        self.prefix, self.split, self.seq_length, self.tokenizer = str(prefix), split, seq_length, tokenizer
        self._corpus = IndexedDocuments(prefix)
        if self._corpus.info is None:
            raise ValueError(f"{prefix} has no .json; prepare it by megatsp preprocess")
        self.info = self._corpus.info
        if self.info.tokenizer_fingerprint != tokenizer.fingerprint:
            raise ValueError(
                f"{prefix} was written with another tokenizer: '{self.info.tokenizer}', fingerprint "
                f"{self.info.tokenizer_fingerprint[:12]}, vocab_size {self.info.vocab_size}; this one is "
                f"'{tokenizer.name}', fingerprint {tokenizer.fingerprint[:12]}, vocab_size "
                f"{tokenizer.vocab_size}. Set data.tokenizer to the former or prepare the data again"
            )
        train, valid = split_documents(self._corpus.num_documents, valid_fraction, seed)
        members = train if split == "train" else valid
        self._documents = members[_permutation(len(members), seed, DOCUMENT_ORDER)]
        self._ends = np.cumsum(self._corpus.sizes[self._documents], dtype=np.int64)
        self.num_tokens = int(self._ends[-1])
        if len(self) < 1:
            raise ValueError(
                f"the {split} split of {prefix} has {self.num_tokens} tokens in {len(members)} documents, "
                f"one sample of seq_length {seq_length} needs {seq_length + 1}: lower seq_length, change "
                f"data.valid_fraction ({valid_fraction}), or prepare more data"
            )

    def __len__(self) -> int:
        """Whole samples in the split."""
        return (self.num_tokens - 1) // self.seq_length

    def sample(self, index: int) -> np.ndarray:
        """Tokens of sample `index`, int64 [T + 1].

        Raises:
            IndexError: index outside [0, len).
        """
        start = self._start(index)
        return self.stream(start, start + self.seq_length + 1)

    def spread(self, count: int) -> np.ndarray:
        """`count` samples (at most all) spread evenly over the split, int64 ascending: what is evaluated."""
        count = min(count, len(self))
        return np.arange(count, dtype=np.int64) * len(self) // count

    def documents(self, index: int) -> list[str]:
        """Names of the documents that sample `index` has tokens of, in its order.

        Raises:
            IndexError: index outside [0, len).
        """
        start = self._start(index)
        first, last = np.searchsorted(self._ends, [start, start + self.seq_length], side="right")
        return [self._corpus.name(int(document)) for document in self._documents[first : last + 1]]

    def stream(self, start: int, stop: int) -> np.ndarray:
        """Tokens start to stop of the stream, int64 [stop - start]; 0 <= start < stop <= num_tokens."""
        assert 0 <= start < stop <= self.num_tokens, (start, stop, self.num_tokens)
        tokens = np.empty(stop - start, dtype=np.int64)
        position = start
        i = int(np.searchsorted(self._ends, start, side="right"))
        while position < stop:
            number = int(self._documents[i])
            document = self._corpus.tokens(number, 0, int(self._corpus.sizes[number]))
            until = min(stop, int(self._ends[i]))
            skipped = position - (int(self._ends[i]) - len(document))
            tokens[position - start : until - start] = document[skipped : skipped + until - position]
            position = until
            i += 1
        return tokens

    def check_vocabulary(self, vocab_size: int) -> None:
        """Check that a model with `vocab_size` embedding rows has one for every id.

        Raises:
            ValueError: the tokenizer, or an id that the data holds, needs more rows.
        """
        needed = max(self.info.vocab_size, self.info.max_token_id + 1)
        if vocab_size < needed:
            raise ValueError(
                f"model.vocab_size is {vocab_size}, but {self.prefix} needs {needed}: its tokenizer has "
                f"{self.info.vocab_size} ids and the largest id in the data is {self.info.max_token_id}"
            )

    def _start(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of the {self.split} split, which has {len(self)}")
        return int(index) * self.seq_length


class Sampler:
    """The endless order of training samples: epoch after epoch, each in a permutation of its own.

    Epoch e is seeded by (seed, e). The order depends on nothing else: no batch size, no rank count.

    Args:
        seed: of the order.
        num_samples: in one epoch.

    Raises:
        ValueError: num_samples below 1, or a negative seed.
    """

    def __init__(self, seed: int, num_samples: int) -> None:
        if num_samples < 1:
            raise ValueError(f"num_samples is {num_samples}; it must be at least 1")
        self.seed, self.num_samples = seed, num_samples
        self._epoch, self._order = 0, _permutation(num_samples, seed, SAMPLE_ORDER, 0)

    def indices(self, consumed: int, count: int) -> np.ndarray:
        """Samples `consumed` to `consumed + count` of the order, int64 [count].

        Raises:
            ValueError: consumed or count is negative.
        """
        if consumed < 0 or count < 0:
            raise ValueError(f"consumed is {consumed} and count is {count}; neither may be negative")
        result = np.empty(count, dtype=np.int64)
        filled = 0
        while filled < count:
            epoch, offset = divmod(consumed + filled, self.num_samples)
            part = self._permuted(epoch)[offset : offset + count - filled]
            result[filled : filled + len(part)] = part
            filled += len(part)
        return result

    def _permuted(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:  # only the epoch in use is held: 8 bytes a sample
            self._epoch, self._order = epoch, _permutation(self.num_samples, self.seed, SAMPLE_ORDER, epoch)
        return self._order


def rank_slices(indices: np.ndarray, micro_batch_size: int, dp_rank: int, dp_size: int) -> list[np.ndarray]:
    """The micro-batches of one data-parallel rank, each int64 [micro_batch_size].

    Sample j of micro-batch m of rank r is indices[(m * dp_size + r) * micro_batch_size + j].

    Args:
        indices: the global batch, int64 [global_batch_size].

    Raises:
        ValueError: the global batch does not divide into micro-batches over the ranks, or dp_rank is outside
            [0, dp_size).
    """
    if micro_batch_size < 1 or dp_size < 1 or len(indices) % (micro_batch_size * dp_size) or not len(indices):
        raise ValueError(
            f"global_batch_size {len(indices)} must be a positive multiple of micro_batch_size "
            f"{micro_batch_size} times the {dp_size} data-parallel ranks"
        )
    if not 0 <= dp_rank < dp_size:
        raise ValueError(f"dp_rank is {dp_rank}; it must be from 0 to {dp_size - 1}")
    return list(indices.reshape(-1, dp_size, micro_batch_size)[:, dp_rank])


def load_batch(dataset: GPTDataset, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Read samples as (tokens int64 [B, T], labels int64 [B, T], loss_mask float32 [B, T]).

    labels[b, t] is the token that follows tokens[b, t]. Every position counts in the loss, those across a
    document's end too: the mask is all ones.
    """
    samples = torch.from_numpy(np.stack([dataset.sample(int(i)) for i in indices]))  # [B, T + 1]
    labels = samples[:, 1:].contiguous()
    return samples[:, :-1].contiguous(), labels, torch.ones(labels.shape, dtype=torch.float32)


def _permutation(count: int, seed: int, use: int, epoch: int = 0) -> np.ndarray:
    """A permutation of range(count), int64 [count], that is the same in every version of NumPy.

    RandomState, unlike the newer Generator, is frozen (NEP 19), so an upgrade does not reorder a resumed run.
    """
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must not be negative")
    bits = np.random.MT19937(np.random.SeedSequence([seed, use, epoch]))
    return np.random.RandomState(bits).permutation(count).astype(np.int64)
