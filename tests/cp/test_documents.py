"""Squares and visits hold every pair of a query and a key of its document once, and no other."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from megatsp.cp.documents import Documents, PackedTokens
from megatsp.tsp.partition import take_local, to_global

CPU = torch.device("cpu")
CHUNK = 3
# Ranks, and how many of them arrive at once.
ARRIVALS = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4), (8, 1), (8, 4), (8, 8)]


def firsts(tokens: int, samples: int = 12) -> Tensor:
    """[samples, tokens]: documents of many lengths, one alone, tokens alone; equal neighbours."""
    generator = torch.Generator().manual_seed(tokens)
    rows = [torch.zeros(tokens, dtype=torch.int64)] * 2 + [torch.arange(tokens)]
    for sample in range(len(rows), samples):
        begins = torch.rand(tokens, generator=generator) < (0.5, 0.2, 0.06)[sample % 3]
        begins[0] = True
        rows.append(torch.where(begins, torch.arange(tokens), 0).cummax(0).values)
    return torch.stack(rows)


def seen_pairs(first: Tensor) -> Tensor:
    """[B, T, T]: whether a query sees a key."""
    at = torch.arange(first.shape[1])
    return (at[None, :, None] >= at) & (at >= first[:, :, None])


@pytest.mark.parametrize(("size", "shards"), ARRIVALS)
def test_every_pair_is_met_once(size, shards):
    tokens = 2 * size * CHUNK
    first = firsts(tokens)
    at = torch.arange(tokens)
    for rank in range(size):
        documents = Documents(first, rank, size, CPU)
        own = take_local(at, rank, size, dim=0)
        met = torch.zeros(len(first), tokens, tokens, dtype=torch.int64)
        for samples, places in documents.own.squares:
            rows = own[places]
            met[samples, rows[:, None], rows] += rows[:, None] >= rows
        for begin in range(0, size, shards):
            arrived = torch.stack([take_local(at, r, size, dim=0) for r in range(begin, begin + shards)])
            keys = to_global(arrived[..., None])[:, 0]
            visits = documents.visits(begin, shards)
            for samples, rows, columns in visits:
                met[samples, own[rows][:, None], keys[columns]] += 1
            for sample in range(len(first)):
                its = [visit for visit in visits if visit.samples.start <= sample < visit.samples.stop]
                assert len(its) <= 2
                ranges = sorted((visit.columns.start, visit.columns.stop) for visit in its)
                assert all(a[1] <= b[0] for a, b in pairwise(ranges))  # columns are disjoint
        assert torch.equal(met[:, own], seen_pairs(first)[:, own].long())


def test_samples_of_equal_documents_are_met_together():
    documents = Documents(torch.zeros(5, 24, dtype=torch.int64), 1, 2, CPU)
    assert documents.own.squares == [(slice(0, 5), slice(0, 12))]
    assert documents.visits(0, 1) == [(slice(0, 5), slice(0, 12), slice(0, 6))]
    mixed = torch.zeros(3, 24, dtype=torch.int64)
    mixed[1, 7:] = 7
    whole = PackedTokens(mixed, CPU)
    assert whole.squares == [
        (slice(0, 1), slice(0, 24)), (slice(1, 2), slice(0, 7)), (slice(1, 2), slice(7, 24)),
        (slice(2, 3), slice(0, 24)),
    ]  # fmt: skip
    assert whole.first is mixed


@pytest.mark.parametrize(
    ("first", "message"),
    [
        (torch.zeros(1, 8), r"first must be int64 \[B, T\] on the CPU.*float32 \(1, 8\)"),
        (torch.zeros(8, dtype=torch.int64), r"first must be int64 \[B, T\]"),
        (torch.zeros(1, 8, dtype=torch.int64, device="meta"), "on meta"),
        (torch.tensor([[0, 0, 3, 3]]), "sample 0 has 3 at token 2"),  # after itself
        (torch.tensor([[0, 0, 0, 0], [0, 0, 1, 1]]), "sample 1 has 1 at token 2"),  # nothing begins there
        (torch.tensor([[0, 1, 0, 0]]), "sample 0 has 0 at token 2"),  # torn apart
        (torch.tensor([[-1, 0, 0, 0]]), "sample 0 has -1 at token 0"),
    ],
)
def test_what_are_no_documents_is_refused(first, message):
    with pytest.raises(ValueError, match=message):
        Documents(first, 0, 1, CPU)


def test_a_sequence_that_does_not_split_is_refused():
    with pytest.raises(ValueError, match="does not split into 2 x 4 chunks"):
        Documents(torch.zeros(1, 12, dtype=torch.int64), 0, 4, CPU)
