import os
from pathlib import Path

import pytest
from preprocess_jobs import write_inputs

from megatsp.data.preprocess.inputs import compression, find, load_rows


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")


def found(folder: Path, *inputs: str, input_type: str = "auto") -> list[tuple[str, str]]:
    files = find([str(folder / given) for given in inputs], input_type)
    return [(os.path.relpath(file.path, folder), file.kind) for file in files]


def test_kinds_and_order(tmp_path: Path) -> None:
    make(tmp_path, "b.jsonl", "a.JSON.gz", "c.ndjson.zst", "x/2.txt", "x/1/9.py", "x/.git/no", "d.parquet")
    assert found(tmp_path, "x", "*.*") == [
        ("x/1/9.py", "text"),
        ("x/2.txt", "text"),
        ("a.JSON.gz", "jsonl"),
        ("b.jsonl", "jsonl"),
        ("c.ndjson.zst", "jsonl"),
        ("d.parquet", "parquet"),
    ]
    assert found(tmp_path, "b.jsonl", input_type="text") == [("b.jsonl", "text")]


def test_a_folder_of_data_files_and_others_is_ambiguous(tmp_path: Path) -> None:
    make(tmp_path, "f/README.md", "f/a.jsonl", "f/b.parquet", "f/b2.jsonl.gz")
    with pytest.raises(ValueError, match=r"a\.jsonl, .*b\.parquet, .*README\.md.*--input-type"):
        found(tmp_path, "f")
    assert found(tmp_path, "f", input_type="jsonl") == [("f/a.jsonl", "jsonl"), ("f/b2.jsonl.gz", "jsonl")]
    assert [kind for _, kind in found(tmp_path, "f", input_type="text")] == ["text"] * 4


def test_what_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for given, message in [
        ("missing", "no such file or folder"),
        ("*.jsonl", "no file matches"),
        ("empty", "has no  files"),
        ("pipe", "no regular file"),
    ]:
        with pytest.raises(ValueError, match=message):
            found(tmp_path, given)
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(ValueError, match="cannot read"):
        found(tmp_path, "dangling")


def test_a_file_is_named_once(tmp_path: Path) -> None:
    make(tmp_path, "a.jsonl", "x/b.txt")
    (tmp_path / "linked.jsonl").symlink_to("a.jsonl")
    os.link(tmp_path / "x" / "b.txt", tmp_path / "x" / "c.txt")
    for given, message in [
        (["a.jsonl", "a.*"], r"--input names \S+/a\.jsonl twice"),
        (["*.jsonl"], r"linked\.jsonl, which is the same file as \S+/a\.jsonl, twice"),
        (["x"], r"c\.txt, which is the same file as \S+b\.txt, twice"),
    ]:
        with pytest.raises(ValueError, match=message):
            found(tmp_path, *given)


def test_links_in_a_circle(tmp_path: Path) -> None:
    make(tmp_path, "x/a.txt", "x/y/b.txt")
    (tmp_path / "x" / "loop").symlink_to(".")
    (tmp_path / "x" / "y" / "up").symlink_to("../..")
    assert found(tmp_path, "x") == [("x/a.txt", "text"), ("x/y/b.txt", "text")]
    (tmp_path / "x" / "self").symlink_to("self")
    for given in ("x", "x/self"):
        with pytest.raises(ValueError, match="cannot read .*self: Too many"):
            found(tmp_path, given)


def test_compression_is_said_in_any_case() -> None:
    names = ["a.jsonl", "a.JSONL.GZ", "a.txt.Zst", "gz", "b.gz.txt"]
    assert [compression(name) for name in names] == ["", ".gz", ".zst", "", ""]


def test_data_sets(tmp_path: Path) -> None:
    import datasets

    write_inputs("dataset", tmp_path, ["a", "b"])
    rows, data = load_rows(str(tmp_path / "set"), None, "train")
    assert (rows.rows, len(data), rows.name) == (2, 2, f"{tmp_path}/set[train]")
    assert load_rows(str(tmp_path / "set"), None, "train")[0] == rows
    datasets.DatasetDict(train=data, test=data.select([1])).save_to_disk(str(tmp_path / "splits"))
    assert load_rows(str(tmp_path / "splits"), None, "test")[0].rows == 1
    with pytest.raises(ValueError, match=r"no split 'valid' \(splits: train, test\)"):
        load_rows(str(tmp_path / "splits"), None, "valid")
    with pytest.raises(ValueError, match="--dataset-config"):
        load_rows(str(tmp_path / "set"), "en", "train")
    with pytest.raises(ValueError, match="--dataset .*nothing"):
        load_rows(str(tmp_path / "nothing"), None, "train")
