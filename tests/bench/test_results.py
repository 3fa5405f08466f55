"""Results as a table, as JSON and as plots, from numbers that nobody measured."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from synthetic import MB, make_memory, make_report, make_row

from megatsp.bench.plot import plot
from megatsp.bench.results import Report, growth, notes, ratios
from megatsp.bench.table import align, render


def cells(table: str, scheme: str) -> dict[str, str]:
    """A row of the first table, by title."""
    lines = [line.strip("| ") for line in table.splitlines() if line.startswith("|")]
    titles = [title.strip() for title in lines[0].split(" | ")]
    row = next(line for line in lines if line.split(" | ")[0].strip() == scheme)
    return dict(zip(titles, (cell.strip() for cell in row.split(" | ")), strict=False))


def test_ratios_are_taken_repeat_by_repeat():
    base, other = make_row("tsp", [100, 200, 0, 400]), make_row("tp", [50, 0, 300, 800])
    assert ratios(other, base) == [0.5, 2.0]
    assert ratios(base, base) == [1, 1, 1]


def test_a_row_has_medians_extremes_ratio_and_bytes():
    memory = make_memory(10, all_gather=3 * MB, all_reduce=MB)
    rows = [make_row("tsp", [100, 300, 200]), make_row("cp", [50, 300, 400], memory=memory)]
    table = render(make_report(rows))
    found = cells(table, "cp")
    assert (found["tokens/s"], found["min"], found["max"]) == ("300", "50", "400")
    assert found["ratio to tsp"] == "1.000 [0.500, 2.000]"
    assert float(found["TFLOP/s"]) == pytest.approx(300 * 2e9 / 1e12)
    assert (found["exposed ms"], found["loss"]) == ("10", "5.00000")
    assert (found["peak MB"], found["gradients"], found["moved"]) == ("10.00", "2.00", "4.00")
    assert found["allocated"] == "20.00" and "note" not in found  # no row has any
    assert cells(table, "tsp")["ratio to tsp"] == "1" and "peak MB" in table
    assert table.startswith("seq_length=64, 2 ranks (8 x 64 tokens a step, fp32")
    assert "| moved, MB a step | all_gather | all_reduce |" in table
    assert "cpu abacus, torch 2" in table


def test_columns_are_aligned_and_only_the_note_is_not_padded():
    table = align(["scheme", "a", "b", "note"], [["x", "1", "", ""], ["longer", "234", "", "why " * 9]])
    head, rule, first, last = table.splitlines()
    assert head == "| scheme |   a | note |" and rule == "| ------ | --: | ---- |"
    assert first == "| x      |   1 |  |" and last.startswith("| longer | 234 | why why")


def test_points_and_worlds_have_tables_of_their_own():
    rows = [make_row("tsp", [1], seq_length=t, world_size=w) for t in (64, 128) for w in (1, 2)]
    text = render(make_report(rows))
    heads = [line.split(" (")[0] for line in text.splitlines() if line.startswith("seq_length=")]
    assert heads == [f"seq_length={t}, {w}" for t in (64, 128) for w in ("1 rank", "2 ranks")]


def test_what_did_not_run_is_a_row_with_its_reason():
    refused = make_row("tp", [], refused="cannot run with 1 setting:\n  - parallel.tp=3")
    rows = [make_row("tsp", [100, 0, 0]), refused]
    text = render(make_report(rows))
    assert cells(text, "tp")["note"] == "cannot run with 1 setting: - parallel.tp=3"
    assert cells(text, "tp")["tokens/s"] == ""
    assert (
        cells(text, "tsp")["note"] == "repeat 2, repeat 3: it broke"
        and cells(text, "tsp")["tokens/s"] == "100"
    )
    assert "parallel.tp=3" in render(make_report([refused]))  # nothing measured at all


@pytest.mark.parametrize(
    ("loss", "dtype", "flagged"),
    [
        (5.0004, "fp32", False),
        (5.006, "fp32", True),
        (5.09, "bf16", False),
        (5.11, "bf16", True),
        (math.nan, "fp32", True),
    ],
)
def test_a_loss_that_differs_is_said(loss, dtype, flagged):
    first, other = make_row("tsp", [1]), make_row("tp", [1], loss=loss)
    other.config["trainer"]["dtype"] = dtype
    group = [make_row("broken", [0]), first, other]
    assert ("LOSS DIFFERS from tsp's" in notes(other, group)) == flagged
    assert notes(first, group) == ""


def test_json_gives_the_report_back():
    report = make_report([make_row("tsp", [1, 0], memory=make_memory(1, all_gather=7)), make_row("tp", [])])
    assert Report.from_json(report.to_json()) == report


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "other"}', '{"format": "megatsp-bench-1"}'])
def test_another_json_is_refused(text):
    with pytest.raises(ValueError, match="not a result that `megatsp bench --json FILE` wrote"):
        Report.from_json(text)


def test_plots_are_written_for_what_was_measured(tmp_path: Path):
    rows = [make_row(s, [10 * t, 12 * t], seq_length=t) for s in ("tsp", "tp") for t in (64, 128)]
    assert [path.name for path in plot(make_report(rows), tmp_path / "new")] == ["tokens_per_s.png"]
    for row in rows[:3]:
        row.memory = make_memory(row.seq_length)
    written = plot(make_report(rows), tmp_path)
    assert [path.name for path in written] == ["tokens_per_s.png", "peak_memory.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


@pytest.mark.parametrize(
    "point", [{}, {"trainer.dtype": "fp32"}, {"model.num_layers": "2", "trainer.dtype": "bf16"}]
)
def test_any_sweep_can_be_drawn(tmp_path: Path, point):
    rows = [make_row("tsp", [10, 12], world_size=world_size) for world_size in (1, 2)]
    for row in rows:
        row.point = point
    assert len(plot(make_report([*rows, make_row("tp", [])]), tmp_path)) == 1


def test_nothing_measured_draws_nothing(tmp_path: Path):
    assert plot(make_report([make_row("tsp", [])]), tmp_path) == []


def test_growth_is_the_exponent_of_the_flops():
    """flops_per_token is 2e9 at every length here: a step of twice the tokens has twice the FLOPs."""
    lengths = (64, 128, 256)
    linear = [make_row("tsp", [100, 110, 90], n) for n in lengths]
    quadratic = [make_row("tp", [6400 / n] * 2, n) for n in lengths]
    assert growth(linear) == pytest.approx(1) and growth(quadratic) == pytest.approx(2)
    assert growth(linear[:1]) is None and growth([make_row("cp", [0], n) for n in lengths]) is None
    text = render(make_report([*linear, *quadratic]))
    assert "(its model FLOPs)^x" in text and "| tp     |     2 | 2.000 |" in text
    assert "model FLOPs)^x" not in render(make_report(linear[:1]))


def test_a_sweep_ends_with_an_overview():
    rows = [
        make_row(name, [rate * n, rate], n, memory=make_memory(n * peak))
        for n in (64, 128)
        for name, rate, peak in (("tsp", 100, 1), ("tp", 50, 2))
    ]
    text = render(make_report(rows))
    assert "| ratio to tsp | seq_length=64 | seq_length=128 |" in text
    assert "| tp           |         0.500 |          0.500 |" in text
    assert "| peak MB | seq_length=64 | seq_length=128 |" in text
    assert "| tp      |        128.00 |         256.00 |" in text
    assert "| peak MB | seq_length" not in render(make_report(rows[:2]))


def test_what_was_not_allocated_has_no_number():
    memory = replace(make_memory(10), allocated=None)
    table = render(make_report([make_row("tsp", [], memory=memory)]))
    assert "allocated" not in table.splitlines()[2] and "10.00" in table
