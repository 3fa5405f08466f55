"""The samples of one split of one corpus: which tokens they have, and which of these are trained."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megatsp.data.corpus import Corpus
from megatsp.data.packing import PIECE
from megatsp.data.sample_index import DocumentOrder, SampleIndex

Span = tuple[int, int]  # positions [start, stop) of a sample


class Sample(NamedTuple):
    """tokens, labels: int64 [n]; mask: float32 [n], 1 where the label is trained; of the positions asked for.

    first: int64 [T], of ALL positions: where in the sample the position's document begins. None: attention
    does not ask for documents.
    """

    tokens: np.ndarray
    labels: np.ndarray
    mask: np.ndarray
    first: np.ndarray | None


class Piece(NamedTuple):
    """A run of a document's tokens in a sample."""

    document: int
    offset: int  # in the document
    length: int


@dataclass(frozen=True)
class Reading:
    """How samples are read: T, whether documents stay apart, whose tokens are trained, the id of padding."""

    seq_length: int
    apart: bool
    loss_on: str  # all, assistant or last
    pad: int
    vocab_size: int


class SampledCorpus:
    """Samples 0 .. len - 1 of one split; any process reads the same.

    concat: sample i is tokens i T to i T + T of the split's stream, its labels one further; a tail too short
    for a sample is not used. Other packings: see `megatsp.data.packing`; what is left of a sample is padding,
    a document of its own that is not trained.
    """

    def __init__(
        self, corpus: Corpus, order: DocumentOrder, index: SampleIndex, packing: str, reading: Reading
    ):
        self.corpus, self.reading, self.facts = corpus, reading, index.facts
        self._order, self._index, self._is_stream = order, index, packing == "concat"

    def __len__(self) -> int:
        return self._index.num_samples

    def pieces(self, index: int) -> list[Piece]:
        """What sample `index` is made of, in its order; the last label's document may be the next one.

        Raises:
            IndexError: index outside [0, len).
        """
        rows = self._rows(index)
        return [Piece(*row) for row in (rows[:-1] if self._is_stream else rows).tolist() if row[2]]

    def sample(self, index: int, spans: Sequence[Span] | None = None) -> Sample:
        """The positions of `spans`, ascending, or all; no token of another position is read, but labels.

        Raises:
            IndexError: index outside [0, len).
            ValueError: an id that is not in the vocabulary.
        """
        seq_length = self.reading.seq_length
        rows = self._rows(index)
        # Where pieces begin in the sample.
        starts = np.cumsum(rows["length"], dtype=np.int64) - rows["length"]
        parts = [self._read(rows, starts, *span) for span in spans or [(0, seq_length)]]
        tokens, labels, mask = parts[0] if len(parts) == 1 else map(np.concatenate, zip(*parts, strict=True))
        self._check(tokens, labels, index)
        first = None
        if self.reading.apart:
            first = np.repeat(starts, rows["length"])[:seq_length]
            if len(first) < seq_length:
                first = np.concatenate([first, np.full(seq_length - len(first), len(first))])
        return Sample(tokens, labels, mask, first)

    @property
    def documents_range(self) -> tuple[int, int]:
        """Of the corpus's seeded order of documents."""
        return self._order.begin, self._order.end

    def documents(self) -> Iterator[np.ndarray]:
        """The tokens of every document of the split, views of the file, in its order."""
        for chunk in self._order.chunks():
            for document, size in zip(chunk.tolist(), self.corpus.sizes(chunk).tolist(), strict=True):
                yield self.corpus.tokens(document, 0, size)

    def _rows(self, index: int) -> np.ndarray:
        """The pieces, PIECE [n]; of a stream T + 1 tokens' worth, the last label's being the last row."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {self.corpus.source}, which has {len(self)}")
        if not self._is_stream:
            begin, end = self._index.starts[index : index + 2]
            return np.asarray(self._index.pieces[begin:end])
        (begin, offset), (end, end_offset) = self._index.concat[index : index + 2].tolist()
        documents = self._order(begin, end + 1)
        offsets = np.zeros(len(documents), np.int64)
        stops = self.corpus.sizes(documents)
        offsets[0], stops[-1] = offset, end_offset
        rows = np.empty(len(documents) + 1, PIECE)
        rows["document"] = np.append(documents, documents[-1])
        rows["offset"] = np.append(offsets, end_offset)
        rows["length"] = np.append(stops - offsets, 1)
        return rows

    def _read(
        self, rows: np.ndarray, starts: np.ndarray, begin: int, end: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, labels and mask of positions begin to end."""
        if self._is_stream:
            return self._read_stream(rows, starts, begin, end)
        tokens, labels = (np.full(end - begin, self.reading.pad) for _ in range(2))
        mask = np.zeros(end - begin, np.float32)
        for at, (document, offset, length) in _overlapping(rows, starts, begin, end):
            low, high = max(begin, at), min(end, at + length)
            inside = slice(low - begin, high - begin)
            source = offset + low - at, offset + high - at + 1
            run = self.corpus.tokens(document, *source)
            tokens[inside], labels[inside] = run[:-1], run[1:]
            mask[inside] = self._trained(document, source[0] + 1, source[1])
        return tokens, labels, mask

    def _read_stream(
        self, rows: np.ndarray, starts: np.ndarray, begin: int, end: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        stream, trained = np.empty(end - begin + 1, np.int64), np.empty(end - begin + 1, np.float32)
        for at, (document, offset, length) in _overlapping(rows, starts, begin, end + 1):
            low, high = max(begin, at), min(end + 1, at + length)
            inside, source = slice(low - begin, high - begin), (offset + low - at, offset + high - at)
            stream[inside] = self.corpus.tokens(document, *source)
            trained[inside] = self._trained(document, *source)
            if self.reading.apart and offset == 0 and low == at:
                trained[low - begin] = 0  # the first token of a document is not the label of the one before
        return stream[:-1], stream[1:].copy(), trained[1:].copy()

    def _trained(self, document: int, start: int, stop: int) -> np.ndarray | float:
        """1 where the tokens are trained as labels."""
        if self.reading.loss_on == "all":
            return 1.0
        roles = self.corpus.roles(document, start, stop)
        return (roles >= (2 if self.reading.loss_on == "last" else 1)).astype(np.float32)

    def _check(self, tokens: np.ndarray, labels: np.ndarray, index: int) -> None:
        for ids in (tokens, labels):
            if ids.min() < 0 or ids.max() >= self.reading.vocab_size:
                wrong = int(ids[(ids < 0) | (ids >= self.reading.vocab_size)][0])
                names = ", ".join(dict.fromkeys(self.corpus.name(p.document) for p in self.pieces(index)[:8]))
                raise ValueError(
                    f"{self.corpus.source} holds the id {wrong}, and model.vocab_size is "
                    f"{self.reading.vocab_size}; it is in one of: {names}. Prepare the data again with the "
                    "model's tokenizer, or set model.vocab_size"
                )


def _overlapping(
    rows: np.ndarray, starts: np.ndarray, begin: int, end: int
) -> list[tuple[int, tuple[int, int, int]]]:
    """The pieces with positions in [begin, end), and where they begin in the sample."""
    low = int(starts.searchsorted(begin, side="right")) - 1
    high = int(starts.searchsorted(end, side="left"))
    found = zip(starts[low:high].tolist(), rows[low:high].tolist(), strict=True)
    return [(at, row) for at, row in found if row[2] and at + row[2] > begin]
