"""The search for the longest sequence, on a memory that grows by a known rule."""

import pytest

from megatsp.bench.longest import find_longest
from megatsp.bench.memory import StepMemory


def search(first: int, limit: int, bytes_per_token: int = 10, fixed: int = 100) -> tuple[int, list[int]]:
    """The length found, and those that were tried."""
    tried = []

    def peak(seq_length: int) -> StepMemory:
        tried.append(seq_length)
        return StepMemory(fixed, 0, 0, 0, 0, fixed + bytes_per_token * seq_length, None, {})

    found = find_longest(peak, first, limit)
    assert found.memory is None or found.memory.peak == fixed + bytes_per_token * found.seq_length <= limit
    return found.seq_length, tried


@pytest.mark.parametrize(("most", "expected"), [(64, 64), (127, 120), (128, 128), (150, 144), (1000, 960)])
def test_to_an_eighth(most, expected):
    """`most`: the longest that fits; what is found is less than an eighth of a doubling below it."""
    found, tried = search(64, 100 + 10 * most)
    assert found == expected and found <= most
    assert len(tried) == len(set(tried)) and all(length % 8 == 0 for length in tried)


def test_not_even_the_first():
    assert search(64, 500) == (0, [64])


def test_lengths_stay_multiples_of_what_was_given():
    _, tried = search(24, 100 + 10 * 100)
    assert all(length % 3 == 0 for length in tried)
