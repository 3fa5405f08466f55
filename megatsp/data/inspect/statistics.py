"""What data is made of: lengths of documents, and what a bounded number of samples hold."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatsp.data.blend import Blend, Draw, Source

CHUNK = 1 << 20  # documents that are counted together
MEASURED_SAMPLES = 1000  # that are measured at most
MEASURED_TOKENS = 1 << 24  # in them


@dataclass(frozen=True)
class LengthCounts:
    """How many documents have each length: lengths, ascending, and counts, both int64 [distinct lengths]."""

    lengths: np.ndarray
    counts: np.ndarray

    @property
    def documents(self) -> int:
        return int(self.counts.sum())

    @property
    def mean(self) -> float:
        return float(self.lengths @ self.counts / self.documents)

    def percentile(self, share: float) -> int:
        """The shortest length that at least this share of the documents does not exceed."""
        ends = np.cumsum(self.counts)
        return int(self.lengths[np.searchsorted(ends, max(1, np.ceil(share * ends[-1])))])


def count_lengths(sizes: Iterable[np.ndarray]) -> LengthCounts:
    """Of all documents of several arrays of sizes; memory grows with the number of distinct lengths alone."""
    lengths, counts = np.empty(0, np.int64), np.empty(0, np.int64)
    for array in sizes:
        for begin in range(0, len(array), CHUNK):
            more, times = np.unique(np.asarray(array[begin : begin + CHUNK], np.int64), return_counts=True)
            merged, place = np.unique(np.concatenate([lengths, more]), return_inverse=True)
            total = np.zeros(len(merged), np.int64)
            np.add.at(total, place, np.concatenate([counts, times]))
            lengths, counts = merged, total
    return LengthCounts(lengths, counts)


def source_lengths(source: Source) -> LengthCounts:
    """Of all documents of a source, those of its other splits included."""
    return count_lengths(shard.sizes for shard in source.samples.corpus.shards)


@dataclass(frozen=True)
class Measured:
    """Over some samples: their number and positions, how many of these are trained and how many padding, and
    documents of each sample, int64 [samples]."""

    samples: int
    positions: int
    trained: int
    padding: int
    documents: np.ndarray


def measure(blend: Blend, draws: Sequence[Draw]) -> Measured:
    """Reads these samples and counts."""
    positions, trained, used = 0, 0, 0
    documents = np.empty(len(draws), np.int64)
    for i, draw in enumerate(draws):
        mask = blend.sample(draw).mask
        pieces = blend.sources[draw.source].samples.pieces(draw.sample)
        positions += len(mask)
        trained += int(np.count_nonzero(mask))
        used += sum(piece.length for piece in pieces)
        documents[i] = len({piece.document for piece in pieces})
    return Measured(len(draws), positions, trained, positions - used, documents)


def num_measured(seq_length: int) -> int:
    """How many samples are measured at most."""
    return max(1, min(MEASURED_SAMPLES, MEASURED_TOKENS // seq_length))


def source_lines(
    blend: Blend, read: Sequence[float], lengths: Sequence[LengthCounts], reader: str
) -> Iterator[str]:
    """What each source is made of, and how much of it is read.

    Args:
        read: samples of each source that the reader reads.
        reader: "the run" or "an evaluation".
    """
    for source, samples, found in zip(blend.sources, read, lengths, strict=True):
        facts, total = source.samples.facts, len(source.samples)
        yield f"{source.name}: weight {source.weight:.4g}"
        lost = [
            f"{facts[key]:,} {text}"
            for key, text in (
                ("truncated", "truncated"),
                ("dropped", "dropped"),
                ("empty", "of fewer than 2 tokens"),
            )
            if facts.get(key)
        ]
        yield (
            f"  {facts['documents']:,} documents with {facts['tokens']:,} tokens make {total:,} samples"
            + (f"; documents {', '.join(lost)}" if lost else "")
        )
        yield f"  {reader} reads {samples:,.0f} samples of it: {samples / total:.3g} epochs"
        yield (
            f"  tokens of its {found.documents:,} documents, of all splits: min {found.percentile(0):,}, "
            f"median {found.percentile(0.5):,}, mean {found.mean:,.1f}, p95 {found.percentile(0.95):,}, "
            f"max {found.percentile(1):,}"
        )


def measured_lines(measured: Measured, first: int) -> Iterator[str]:
    """What the measured samples hold; first: the place of the first of them."""
    count, positions, documents = measured.samples, measured.positions, measured.documents
    yield f"measured on {count:,} samples, {first:,} to {first + count - 1:,}:"
    yield f"  trained labels: {measured.trained / positions:.2%} of the positions"
    yield f"  padding: {measured.padding / positions:.2%}"
    yield (
        f"  documents in a sample: min {documents.min():,}, mean {documents.mean():,.1f}, "
        f"max {documents.max():,}"
    )
