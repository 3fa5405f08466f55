from bisect import bisect_left, insort
from collections.abc import Iterator

import numpy as np
import pytest

from megatsp.data import packing
from megatsp.data.packing import PIECE, best_fit, cut, pack


def sizes_of(count: int, seed: int = 0) -> np.ndarray:
    """Tokens of documents: some with none or one, most short, a few of several samples."""
    return np.random.RandomState(seed).lognormal(2.5, 1.4, count).astype(np.int64)


def chunks(pieces: np.ndarray, length: int) -> Iterator[np.ndarray]:
    for begin in range(0, len(pieces), length):
        yield pieces[begin : begin + length]


def samples_of(pieces: np.ndarray, seq_length: int, how: str, chunk: int = 10**9) -> list[np.ndarray]:
    found = []
    for part, counts in pack(chunks(pieces, chunk), seq_length, how):
        assert counts.sum() == len(part)
        found += np.split(part, np.cumsum(counts)[:-1])
    return found


@pytest.mark.parametrize("seq_length", [1, 5, 32, 1000])
def test_cut_covers_every_transition_once(seq_length):
    sizes = sizes_of(300)
    documents = np.arange(1000, 1300)
    pieces, truncated, dropped = cut(documents, sizes, seq_length, "split")
    assert (truncated, dropped) == (0, 0) and pieces.dtype == PIECE
    labels = [(d, o + i + 1) for d, o, n in pieces.tolist() for i in range(n)]
    assert labels == [
        (d, i) for d, size in zip(documents.tolist(), sizes.tolist(), strict=True) for i in range(1, size)
    ]
    assert pieces["length"].min() >= 1 and pieces["length"].max() <= seq_length


def test_long_documents_are_truncated_or_dropped_and_counted():
    documents, sizes = np.array([7, 8, 9, 10]), np.array([3, 12, 11, 30])
    assert cut(documents, sizes, 10, "truncate")[0].tolist() == [
        (7, 0, 2),
        (8, 0, 10),
        (9, 0, 10),
        (10, 0, 10),
    ]
    assert cut(documents, sizes, 10, "truncate")[1:] == (2, 0)
    assert cut(documents, sizes, 10, "drop")[0].tolist() == [(7, 0, 2), (9, 0, 10)]
    assert cut(documents, sizes, 10, "drop")[1:] == (0, 2)
    assert cut(documents, sizes, 10, "split")[0].tolist()[-3:] == [(10, 0, 10), (10, 10, 10), (10, 20, 9)]


@pytest.mark.parametrize("how", ["greedy", "best_fit", "pad"])
@pytest.mark.parametrize("chunk", [1, 13, 10**9])
def test_every_piece_is_in_one_sample_that_has_room(how, chunk, monkeypatch):
    monkeypatch.setattr(packing, "WINDOW", 50)
    pieces, _, _ = cut(np.arange(400), sizes_of(400), 64, "split")
    samples = samples_of(pieces, 64, how, chunk)
    assert sorted(np.concatenate(samples).tolist()) == sorted(pieces.tolist())
    assert all(0 < sample["length"].sum() <= 64 for sample in samples)
    for sample in samples:  # pieces keep their order
        assert sample.tolist() == sorted(sample.tolist())
    reference = samples_of(pieces, 64, how)
    assert [s.tolist() for s in samples] == [s.tolist() for s in reference]  # however the pieces came


def test_greedy_begins_a_sample_only_when_it_must():
    pieces, _, _ = cut(np.arange(300), sizes_of(300), 40, "split")
    samples = samples_of(pieces, 40, "greedy")
    assert np.concatenate(samples).tolist() == pieces.tolist()
    for sample, following in zip(samples, samples[1:], strict=False):
        assert sample["length"].sum() + following["length"][0] > 40


def rooms_by_best_fit_decreasing(lengths: list[int], capacity: int) -> list[int]:
    """The rule one piece at a time: room that is left in each sample, ascending."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        i = bisect_left(rooms, length)
        insort(rooms, (rooms.pop(i) if i < len(rooms) else capacity) - length)
    return rooms


@pytest.mark.parametrize("seed", range(60))
def test_best_fit_is_best_fit_decreasing(seed):
    random = np.random.RandomState(seed)
    capacity = random.randint(1, 60)
    lengths = random.randint(1, capacity + 1, random.randint(1, 200))
    groups = best_fit(lengths, capacity)
    assert sorted(np.concatenate(groups).tolist()) == list(range(len(lengths)))
    rooms = sorted(int(capacity - lengths[group].sum()) for group in groups)
    assert rooms == rooms_by_best_fit_decreasing(lengths.tolist(), capacity)


def test_best_fit_wastes_less_than_greedy():
    pieces, _, _ = cut(np.arange(20000), sizes_of(20000), 256, "split")
    waste = {
        how: 1 - pieces["length"].sum() / 256 / len(samples_of(pieces, 256, how))
        for how in ("greedy", "best_fit")
    }
    assert waste["best_fit"] < 0.001 < 0.02 < waste["greedy"]
