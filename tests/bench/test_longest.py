"""The search for the longest sequence, on a memory that grows by a known rule."""

import pytest

from megatsp.bench.longest import find_longest, with_length
from megatsp.bench.memory import StepMemory
from megatsp.bench.schemes import make_cases, parse_schemes


def search(first: int, limit: int, step: int = 8, broken: int = 0) -> tuple[int, list[int]]:
    """The length found, and those that were tried."""
    tried, bytes_per_token, fixed = [], 10, 100

    def peak(seq_length: int) -> StepMemory | None:
        tried.append(seq_length)
        if seq_length == broken:
            return None
        return StepMemory(fixed, 0, 0, 0, 0, fixed + bytes_per_token * seq_length, None, {})

    found = find_longest(peak, first, step, limit)
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


def test_lengths_are_those_that_split():
    found, tried = search(24, 100 + 10 * 100, step=12)
    assert found == 96 and all(length % 12 == 0 for length in tried)


def test_what_cannot_be_simulated_leaves_what_fitted():
    assert search(64, 100 + 10 * 1000, broken=256)[0] == 240  # below it, to an eighth


def test_bucket_counts_are_chosen_anew_at_every_length():
    (case,) = make_cases(["trainer.seq_length=256"], parse_schemes(["tsp"]), [], [2])
    longer = with_length(case, 2**20).parallel
    assert case.config.parallel.mlp_buckets == 1 and longer.mlp_buckets == 2
    (direct,) = make_cases([f"trainer.seq_length={2**20}"], parse_schemes(["tsp"]), [], [2])
    assert direct.config.parallel == longer
