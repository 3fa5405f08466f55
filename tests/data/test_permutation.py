from collections import Counter
from itertools import permutations

import numpy as np
import pytest

from megatsp.data.permutation import FEW, Permutation


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 10, 97, 100, 101, 1024, 12345])
def test_every_number_comes_once(count):
    found = Permutation(count, 3, "a")(np.arange(count))
    assert found.dtype == np.int64 and sorted(found) == list(range(count))


def test_any_part_can_be_asked_for():
    permutation = Permutation(1000, 1)
    whole = permutation(np.arange(1000))
    assert permutation(np.arange(300, 307)).tolist() == whole[300:307].tolist()
    assert permutation(np.array([[5], [999]])).tolist() == [[whole[5]], [whole[999]]]
    assert permutation(np.empty(0, np.int64)).shape == (0,)


@pytest.mark.parametrize("count", [1, 2, 13, 1000, 12345, 10**9, 2**62 - 1])
def test_few_indices_are_sent_as_many_are(count):
    permutation = Permutation(count, 7, "b")
    indices = np.unique(np.linspace(0, count - 1, 40).astype(np.int64).clip(0, count - 1))
    many = permutation(np.concatenate([indices, indices[:1].repeat(FEW)]))
    for size in range(1, FEW + 1):
        few = [permutation(indices[i : i + size]) for i in range(0, len(indices), size)]
        assert np.concatenate(few).tolist() == many[: len(indices)].tolist()
    assert permutation(indices[0]).shape == () and permutation(indices[0]) == many[0]
    with pytest.raises(AssertionError):
        permutation(np.array([count]))


def test_a_long_range_needs_no_memory_for_it():
    found = Permutation(10**15, 1)(np.arange(10**15 - 100, 10**15))
    assert len(set(found.tolist())) == 100 and found.min() >= 0 and found.max() < 10**15
    assert found.max() - found.min() > 10**14


def test_keys_give_unrelated_permutations():
    orders = [Permutation(200, *key)(np.arange(200)) for key in ((1,), (2,), (1, "a"), (1, "b"), (1, 0))]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert (one == other).sum() < 12  # by chance 1


def test_all_permutations_are_about_as_likely():
    keys = 12000
    counts = Counter(tuple(Permutation(4, key)(np.arange(4)).tolist()) for key in range(keys))
    assert counts.keys() == set(permutations(range(4)))
    expected = keys / 24
    chi_squared = sum((count - expected) ** 2 / expected for count in counts.values())
    assert chi_squared < 60  # 23 degrees of freedom: above it once in 30,000


def test_order_does_not_change_between_versions():
    """A checkpoint's cursor must mean the same samples under another NumPy, and on another machine."""
    assert Permutation(8, 1234, "samples", 0, 0)(np.arange(8)).tolist() == PINNED[8]
    assert Permutation(10**12, 1234, "documents")(np.arange(3)).tolist() == PINNED[10**12]
    assert Permutation(8, np.int64(1234), "samples", 0, 0)(np.arange(8)).tolist() == PINNED[8]


PINNED = {
    8: [1, 5, 7, 0, 4, 2, 3, 6],
    10**12: [570873374408, 471330692296, 166242550774],
}
