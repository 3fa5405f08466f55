from collections import Counter

import numpy as np
import pytest

from megatsp.data.blend import Blend, Draw, Source, interleave


class Counted:
    """A source of so many samples."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count


def blend(weights: list[float], counts: list[int], seed: int = 1) -> Blend:
    return Blend(
        [Source(f"s{i}", w, Counted(n)) for i, (w, n) in enumerate(zip(weights, counts, strict=True))], seed
    )


WEIGHTS = [[1.0], [0.5, 0.5], [0.7, 0.2, 0.1], [0.98, 0.01, 0.005, 0.005], [1 / 3, 1 / 3, 1 / 3]]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_prefix_has_every_sources_share(weights):
    sources, ordinals = interleave(np.array(weights), 0, 3000)
    for k, weight in enumerate(weights):
        chosen = np.flatnonzero(sources == k)
        assert ordinals[chosen].tolist() == list(range(len(chosen)))  # none is skipped or comes twice
        counts = np.cumsum(sources == k)
        assert np.abs(counts - weight * np.arange(1, 3001)).max() < 1 + len(weights) / 2


@pytest.mark.parametrize("weights", WEIGHTS)
def test_any_part_of_the_order_is_that_part_of_the_whole(weights):
    whole = interleave(np.array(weights), 0, 400)
    random = np.random.RandomState(0)
    for _ in range(60):
        begin = random.randint(0, 390)
        count = random.randint(0, 400 - begin)
        part = interleave(np.array(weights), begin, count)
        assert [p.tolist() for p in part] == [w[begin : begin + count].tolist() for w in whole]


def test_far_along_the_order_nothing_is_lost():
    weights = np.array([0.6, 0.3, 0.1])
    begin = 10**12
    one = interleave(weights, begin, 50)
    two = interleave(weights, begin + 25, 25)
    assert one[0][25:].tolist() == two[0].tolist() and one[1][25:].tolist() == two[1].tolist()
    assert Counter(one[0].tolist()) == {0: 30, 1: 15, 2: 5}


def test_each_source_runs_through_its_own_epochs_in_another_order_each():
    mixed = blend([0.75, 0.25], [30, 7])
    draws = mixed.draw(0, 200)
    for source, count in ((0, 30), (1, 7)):
        own = [d for d in draws if d.source == source]
        epochs = [[d.sample for d in own[i : i + count]] for i in range(0, len(own) - count + 1, count)]
        assert len(epochs) >= 5
        assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
        assert [d.epoch for d in own] == [i // count for i in range(len(own))]
    assert mixed.sources[1].epochs(200) == pytest.approx(200 * 0.25 / 7)


def test_draws_depend_on_the_cursor_and_the_seed_alone():
    whole = blend([0.7, 0.3], [11, 4]).draw(0, 60)
    assert blend([0.7, 0.3], [11, 4]).draw(0, 60) == whole
    for begin, count in [(58, 2), (0, 5), (9, 20), (3, 0), (22, 1)]:
        assert blend([0.7, 0.3], [11, 4]).draw(begin, count) == whole[begin : begin + count]
    other = blend([0.7, 0.3], [11, 4], seed=2).draw(0, 60)
    assert other != whole and [d.source for d in other] == [d.source for d in whole]


def test_order_does_not_change_between_versions():
    assert [tuple(d) for d in blend([0.7, 0.3], [4, 2], seed=1234).draw(0, 8)] == PINNED


def test_evaluation_is_spread_over_each_source():
    mixed = blend([0.75, 0.25], [100, 10])
    draws = mixed.spread(16)
    assert draws == [Draw(0, 0, i * 100 // 12) for i in range(12)] + [
        Draw(1, 0, i * 10 // 4) for i in range(4)
    ]
    few = blend([0.5, 0.5], [100, 3]).spread(20)  # no sample counts twice
    assert Counter(d.source for d in few) == {0: 10, 1: 3} and len(set(few)) == 13
    assert len(mixed.spread(10**6)) == len(mixed) == 110
    assert blend([1.0], [9]).spread(3) == [Draw(0, 0, 0), Draw(0, 0, 3), Draw(0, 0, 6)]


PINNED = [(0, 0, 2), (1, 0, 0), (0, 0, 3), (0, 0, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1), (0, 1, 2)]
