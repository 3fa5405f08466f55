from pathlib import Path

import pytest
from preprocess_jobs import write_inputs, write_parquet

from megatsp.data.preprocess import plan
from megatsp.data.preprocess.inputs import InputFile, Rows, find
from megatsp.data.preprocess.sources import Position, records


def jsonl(path: str, num_bytes: int) -> InputFile:
    return InputFile(path, "jsonl", num_bytes, 0)


def covered(cut: list[list[plan.Piece]]) -> dict[str, list[tuple[int, int]]]:
    ranges: dict[str, list[tuple[int, int]]] = {}
    for pieces in cut:
        assert pieces
        for piece in pieces:
            ranges.setdefault(piece.path, []).append((piece.begin, piece.end))
    return ranges


@pytest.mark.parametrize("count", [1, 2, 3, 7, 50, 1000])
def test_partitions_cover_the_input_in_order_and_evenly(count: int) -> None:
    inputs = [jsonl("a", 100), jsonl("b", 1), jsonl("empty", 0), jsonl("c", 333), Rows("d", 10, 90, "")]
    cut = plan.partitions(inputs, count)
    assert len(cut) <= count
    ranges = covered(cut)
    assert list(ranges) == ["a", "b", "empty", "c", "d"]
    for path, size in [("a", 100), ("b", 1), ("empty", 0), ("c", 333), ("d", 10)]:
        assert ranges[path][0][0] == 0 and ranges[path][-1][1] == size
        assert all(end == begin for (_, end), (begin, _) in zip(ranges[path], ranges[path][1:], strict=False))
    if count <= 7:
        assert len(cut) == count
        sizes = [sum(piece.bytes for piece in pieces) for pieces in cut]
        assert max(sizes) - min(sizes) <= 3


def test_files_that_cannot_be_cut(tmp_path: Path) -> None:
    files = [InputFile("a.jsonl.gz", "jsonl", 100, 0), InputFile("b.txt", "text", 50, 0), jsonl("c", 50)]
    assert [[piece.path for piece in pieces] for pieces in plan.partitions(files, 4)] == [
        ["a.jsonl.gz"],
        ["b.txt"],
        ["c"],
    ]
    write_inputs("parquet", tmp_path)
    cut = plan.partitions(find([str(tmp_path)]), 4)
    assert len(cut) == 4
    assert [(piece.begin, piece.end) for pieces in cut for piece in pieces] == [
        (0, 3),
        (3, 5),
        (5, 7),
        (7, 9),
    ]
    assert (
        sum(piece.bytes for pieces in cut for piece in pieces) == (tmp_path / "data.parquet").stat().st_size
    )
    write_parquet(tmp_path / "data.parquet", {"text": []})
    (cut,) = plan.partitions(find([str(tmp_path)]), 4)
    assert list(records(cut[0], ["text"], 1000, Position())) == []


@pytest.mark.parametrize(
    "megabytes, partitions", [(1, 1), (8, 2), (1000, 64), (100_000, 745), (10**7, 20_000)]
)
def test_automatic_size(megabytes: int, partitions: int) -> None:
    cut = plan.partitions([jsonl("a", megabytes * 10**6)])
    assert len(cut) == pytest.approx(partitions, rel=0.02)


def test_what_a_job_is(tmp_path: Path) -> None:
    inputs = [jsonl("a", 100), jsonl("b", 100)]
    job = plan.description(inputs, {"append_eod": True}, plan.partitions(inputs, 2))
    again = plan.description(inputs, {"append_eod": True}, plan.partitions(inputs, 3))
    assert {key for key in job if job[key] != again[key]} == {"partitions"}
    assert plan.source_of(job) == plan.source_of(again)
    changed = plan.description([inputs[0], InputFile("b", "jsonl", 100, 1)], {"append_eod": True}, [])
    other = plan.description(inputs, {"append_eod": False}, [])
    assert len({plan.source_of(each) for each in (job, changed, other)}) == 3
