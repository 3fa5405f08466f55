"""Several sources mixed by weight, and the one order in which their samples are consumed.

Which sample comes at place j of the order follows from the seed, the sources and j alone: no rank count, no
batch size, no state. Source k's t-th sample is due at time (t + 1/2) / weight_k, and the earliest is next: at
every place each source has had its share, to within a sample or two. Each source runs through its own epochs,
every epoch in a permutation of its own.

Source: the rule is Webster's apportionment, as Balinski and Young, Fair Representation (1982), appendix A.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megatsp.data.dataset import Sample, SampledCorpus, Span
from megatsp.data.permutation import Permutation


class Draw(NamedTuple):
    """One place of the order: sample `sample` of source `source`, in that source's epoch `epoch`."""

    source: int
    epoch: int
    sample: int


@dataclass
class Source:
    """name: as the user gave it; weight: its share of the samples, of 1."""

    name: str
    weight: float
    samples: SampledCorpus

    def epochs(self, consumed: int) -> float:
        """How often its samples were read when `consumed` samples of the blend were."""
        return consumed * self.weight / len(self.samples)


class Blend:
    """One split of all sources.

    Args:
        sources: their weights add up to 1.
        seed: of the order.
    """

    def __init__(self, sources: Sequence[Source], seed: int) -> None:
        self.sources, self.seed = list(sources), seed
        self._weights = np.array([source.weight for source in sources])

    def __len__(self) -> int:
        """Samples in all sources."""
        return sum(len(source.samples) for source in self.sources)

    def draw(self, begin: int, count: int) -> list[Draw]:
        """Places `begin` to `begin + count` of the endless order."""
        sources, ordinals = interleave(self._weights, begin, count)
        lengths = np.array([len(source.samples) for source in self.sources])[sources]
        epochs, places = np.divmod(ordinals, lengths)
        samples = np.empty(count, np.int64)
        for source, epoch in np.unique(np.stack([sources, epochs]), axis=1).T.tolist():
            chosen = (sources == source) & (epochs == epoch)
            length = len(self.sources[source].samples)
            samples[chosen] = Permutation(length, self.seed, "samples", source, epoch)(places[chosen])
        return [Draw(*row) for row in zip(sources.tolist(), epochs.tolist(), samples.tolist(), strict=True)]

    def spread(self, count: int) -> list[Draw]:
        """`count` samples, or all, by weight over the sources and evenly over each: what is evaluated."""
        if count >= len(self):
            shares = [len(source.samples) for source in self.sources]
        else:
            sources, _ = interleave(self._weights, 0, count)
            shares = np.bincount(sources, minlength=len(self.sources)).tolist()
        draws = []
        for i, (source, share) in enumerate(zip(self.sources, shares, strict=True)):
            length = len(source.samples)
            share = min(share, length)
            draws += [Draw(i, 0, place * length // share) for place in range(share)]
        return draws

    def sample(self, draw: Draw, spans: Sequence[Span] | None = None) -> Sample:
        """The sample at a place of the order: see `SampledCorpus.sample`."""
        return self.sources[draw.source].samples.sample(draw.sample, spans)

    def names(self, draw: Draw) -> list[str]:
        """What messages call the documents of a sample, in its order."""
        samples = self.sources[draw.source].samples
        return list(dict.fromkeys(samples.corpus.name(p.document) for p in samples.pieces(draw.sample)))


def interleave(weights: np.ndarray, begin: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Which source is at the places begin to begin + count, and how many of its samples came before.

    Args:
        weights: float64 [K], positive, adding up to 1.
    Returns:
        source and ordinal, int64 [count] each; source k's ordinals are 0, 1, 2, ... along the places.
    """
    margin = len(weights) + 1.0  # at time t between t - K/2 and t + K/2 samples were due
    early, late = max(0.0, begin - margin), begin + count + margin
    sources, ordinals, times = [], [], []
    before = 0
    for k, weight in enumerate(weights.tolist()):
        first, stop = _due_before(weight, early), _due_before(weight, late)
        before += first
        ordinals.append(np.arange(first, stop))
        sources.append(np.full(stop - first, k))
        times.append((ordinals[-1] + 0.5) / weight)
    source, ordinal, time = (np.concatenate(parts) for parts in (sources, ordinals, times))
    chosen = np.lexsort((source, time))[begin - before : begin - before + count]
    assert begin >= before and len(chosen) == count
    return source[chosen], ordinal[chosen]


def _due_before(weight: float, time: float) -> int:
    """How many samples of a source were due before a time, by the very numbers that are sorted."""
    count = max(0, int(weight * time - 0.5))
    while count > 0 and (count - 0.5) / weight >= time:
        count -= 1
    while (count + 0.5) / weight < time:
        count += 1
    return count
