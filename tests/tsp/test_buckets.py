"""Buckets hold every column of every matrix once, and cut where they should."""

from itertools import pairwise

import pytest
import torch

from megatsp.tsp.buckets import (
    Matrix,
    Part,
    Span,
    attention_part,
    even_cuts,
    h_major,
    head_part,
    mlp_part,
    owner_cuts,
    width,
)


def assert_whole(part: Part) -> None:
    """Each matrix's spans, in bucket order, follow one another from its first column to its last."""
    for index, matrix in enumerate(part.matrices):
        spans = [span for bucket in part.buckets for span in bucket if span.matrix == index]
        assert spans[0].start == 0 and spans[-1].stop == matrix.columns
        assert all(a.stop == b.start for a, b in pairwise(spans))
    assert sum(map(width, part.buckets)) == sum(matrix.columns for matrix in part.matrices)


@pytest.mark.parametrize(("columns", "count"), [(12, 4), (13, 4), (3, 3), (107, 8)])
def test_even_cuts(columns, count):
    cuts = even_cuts(columns, count)
    sizes = [b - a for a, b in pairwise(cuts)]
    assert (cuts[0], cuts[-1], len(sizes)) == (0, columns, count)
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(("columns", "owners"), [(12, 4), (9, 4), (5, 4), (9, 8), (107, 8), (7, 1)])
def test_owner_cuts_are_those_of_torch_chunk(columns, owners):
    sizes = [chunk.numel() for chunk in torch.empty(columns).chunk(owners)]  # and so DTensor's Shard
    sizes += [0] * (owners - len(sizes))
    assert [b - a for a, b in pairwise(owner_cuts(columns, owners))] == sizes
    thrice = owner_cuts(columns, owners, per_owner=3)
    assert len(thrice) == 3 * owners + 1
    assert thrice[::3] == owner_cuts(columns, owners)


@pytest.mark.parametrize(("query_heads", "kv_heads", "count"), [(8, 8, 4), (8, 2, 2), (6, 3, 1), (4, 1, 1)])
def test_attention_buckets_hold_groups_of_heads(query_heads, kv_heads, count):
    d = 6
    part = attention_part(query_heads, kv_heads, d, count)
    assert_whole(part)
    assert [m.h_dim for m in part.matrices] == [1, 1, 1, 0]
    group = query_heads // kv_heads
    for q, k, v, o in part.buckets:
        assert (k.start % d, k.stop % d) == (0, 0)
        assert (q.start, q.stop) == (group * k.start, group * k.stop)
        assert (v.start, v.stop, o.start, o.stop) == (k.start, k.stop, q.start, q.stop)


@pytest.mark.parametrize("cuts", [even_cuts(107, 3), owner_cuts(107, 4, 2)])
def test_mlp_buckets(cuts):
    part = mlp_part(107, cuts)
    assert_whole(part)
    assert part.buckets[0] == tuple(Span(m, 0, cuts[1]) for m in range(3))
    assert [m.h_dim for m in part.matrices] == [1, 1, 0]


def test_head_buckets():
    part = head_part(131, 5)
    assert_whole(part)
    assert part.label == "head" and len(part.buckets) == 5


def test_h_major_is_a_view_with_h_first():
    weight = torch.arange(6.0).view(2, 3)
    assert h_major(weight, Matrix("o", 0, 3)) is weight
    columns = h_major(weight, Matrix("q", 1, 2))
    assert columns.shape == (3, 2)
    columns[0, 1] = 9
    assert weight[1, 0] == 9
