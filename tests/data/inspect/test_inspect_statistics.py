"""Lengths of documents, counted piece by piece, and their histogram."""

from pathlib import Path

import numpy as np
import pytest

from megatsp.data.inspect import statistics
from megatsp.data.inspect.plot import histogram, plot_lengths
from megatsp.data.inspect.statistics import LengthCounts, count_lengths


def test_counts_are_those_of_all_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "CHUNK", 7)
    sizes = np.random.default_rng(1).integers(0, 40, 100).astype(np.int32)
    found = count_lengths([sizes[:30], sizes[30:30], sizes[30:]])
    expected = np.unique(sizes, return_counts=True)
    assert found.lengths.tolist() == expected[0].tolist() and found.counts.tolist() == expected[1].tolist()
    assert found.documents == 100 and found.mean == pytest.approx(sizes.mean())
    ordered = np.sort(sizes)
    for share in (0.0, 0.01, 0.5, 0.95, 0.999, 1.0):
        assert found.percentile(share) == ordered[max(0, int(np.ceil(share * 100)) - 1)]


@pytest.mark.parametrize(
    "sizes", [[1], [1000], [2**31 - 1], [0, 0, 3], [0], [10, 100, 1000], [9, 11, 99, 101], range(1, 3000)]
)
def test_every_document_is_in_a_bin(sizes: list[int], tmp_path: Path) -> None:
    found = count_lengths([np.array(sizes)])
    values, edges = histogram(found)
    assert values.sum() == len(sizes) and (values >= 0).all()
    assert edges[0] <= max(1, min(sizes)) and max(sizes) < edges[-1]
    assert (edges == np.floor(edges)).all() and (np.diff(edges) > 0).all()
    plot_lengths({"a" * 100: found, "b": found}, 256, tmp_path / "new" / "x.png", "title")
    assert (tmp_path / "new" / "x.png").read_bytes().startswith(b"\x89PNG")


def test_ten_million_documents_take_no_list() -> None:
    sizes = np.full(10_000_000, 5, np.int32)
    sizes[::2] = 700
    found = count_lengths([sizes])
    assert (found.documents, found.percentile(0.5), found.percentile(0.51)) == (10_000_000, 5, 700)


def test_samples_that_are_measured_are_bounded() -> None:
    assert statistics.num_measured(256) == 1000
    assert statistics.num_measured(1 << 20) == 16
    assert statistics.num_measured(1 << 30) == 1
    assert isinstance(count_lengths([]), LengthCounts)
