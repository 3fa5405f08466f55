import gzip
import json
import os
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
import zstandard
from preprocess_jobs import TEXTS, json_lines, write_inputs, write_parquet
from pyarrow import parquet

from megatsp.data.preprocess import sources
from megatsp.data.preprocess.inputs import kind_of
from megatsp.data.preprocess.sources import Bad, Piece, Position, message, num_row_groups, records, texts_of

LIMIT = 1000


def piece_of(path: Path, begin: int = 0, end: int = -1, kind: str = "") -> Piece:
    kind = kind or kind_of(str(path))
    end = end if end >= 0 else num_row_groups(str(path)) if kind == "parquet" else path.stat().st_size
    return Piece(kind, str(path), begin, end, path.stat().st_size)


def read(piece: Piece, *keys: str, **settings: Any) -> list[tuple[int, Any]]:
    found = records(piece, keys or ("text",), LIMIT, Position(), **settings)
    return [(number, texts_of(content, keys or ("text",), LIMIT)) for number, content in found]


def messages(piece: Piece, *keys: str, **settings: Any) -> list[str]:
    return [message(piece, n, bad) for n, bad in read(piece, *keys, **settings) if isinstance(bad, Bad)]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
def test_records_are_numbered(kind: str, tmp_path: Path) -> None:
    write_inputs(kind, tmp_path)
    assert read(piece_of(tmp_path / f"data.{kind}")) == [(i, [text]) for i, text in enumerate(TEXTS, start=1)]


def test_every_cut_of_jsonl_gives_each_line_once(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    content = json_lines(["a", "bb", "c"])
    for ending in (b"", b'{"text": "no newline"}'):
        path.write_bytes(content + ending)
        whole = [texts for _, texts in read(piece_of(path))]
        size = path.stat().st_size
        for cut in range(1, size):
            parts = [read(piece_of(path, 0, cut)), read(piece_of(path, cut, size))]
            assert [texts for part in parts for _, texts in part] == whole, cut
            # The place of a record is that in the file, wherever the cut is.
            lines = [sources.place(piece_of(path, cut, size), number) for number, _ in parts[1]]
            first = len(parts[0]) + 1
            assert lines == [f"{path} line {first + i}" for i in range(len(lines))], cut


def test_row_groups_of_parquet(tmp_path: Path) -> None:
    write_inputs("parquet", tmp_path)
    path = tmp_path / "data.parquet"
    assert num_row_groups(str(path)) == 9 == len(sources.row_group_bytes(str(path)))
    assert [n for n, _ in read(piece_of(path, 2, 4))] == list(range(15, 29))


def test_blank_lines_and_a_byte_order_mark_are_no_records(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\n  \n{"text": "b"}\n\n')
    assert read(piece_of(tmp_path / "a.jsonl")) == [(1, ["a"]), (4, ["b"])]


@pytest.mark.parametrize(
    "line, expected",
    [
        (b'{"text": "a"', "broken JSON: Expecting ',' delimiter"),
        (b"[" * 100_000, "longer than"),
        (b"[" * 6000, "broken JSON"),
        (b'["a"]', "no JSON object: it is a list"),
        (b'{"text": "\xff"}', "bad UTF-8: byte 0xFF at byte 10 of the line"),
        (rb'{"text": "a\ud800"}', "lone surrogate: U+D800 at character 1"),
        (b'{"text": ""}', "empty document"),
        (b'{"txt": "a", "id": 1}', "missing key text: the record has txt, id; did you mean txt?"),
        (b'{"text": 3}', "text is no text: it is a number"),
        (b'{"text": null}', "text is no text: it is null"),
        (b'{"text": "' + b"a" * 1001 + b'"}', "longer than --max-document-bytes 1000: 1001 bytes"),
        (b'{"text": "' + "é".encode() * 501 + b'"}', "longer than --max-document-bytes 1000: 1002 bytes"),
    ],
)
def test_bad_lines(tmp_path: Path, line: bytes, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "BATCH_BYTES", 1000)  # of which the longest line is
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "before"}\n' + line + b'\n{"text": "after"}\n')
    found = read(piece_of(path))
    assert [number for number, _ in found] == [1, 2, 3]
    assert (found[0][1], found[2][1]) == (["before"], ["after"])
    assert messages(piece_of(path))[0].startswith(f"{path} line 2: {expected}")


def test_as_long_as_allowed(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(["\x00" * LIMIT, "é" * (LIMIT // 2)]))
    assert [texts for _, texts in read(piece_of(tmp_path / "a.jsonl"))] == [["\x00" * LIMIT], ["é" * 500]]


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst"])
@pytest.mark.parametrize("damage", ["truncated", "corrupt", "other", "frame"])
def test_damaged_compressed_files(kind: str, damage: str, tmp_path: Path) -> None:
    lines = json_lines([str(i) + os.urandom(400).hex() for i in range(300)])
    content = gzip.compress(lines) if kind.endswith("gz") else zstandard.compress(lines)
    path = tmp_path / f"a.{kind}"
    if damage == "frame":  # a whole one and the beginning of another
        path.write_bytes(content + content[:2000])
    elif damage == "truncated":
        path.write_bytes(content[: len(content) * 3 // 4])
    elif damage == "corrupt":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes(64) + content[middle + 64 :])
    else:
        path.write_bytes(lines)
    said = messages(piece_of(path))
    last = said[-1]
    if damage in ("truncated", "frame"):
        assert "truncated file: the compressed data ends after it" in last and len(said) == 1
        number = int(last.split(" line ")[1].split(":")[0])
        assert number >= (300 if damage == "frame" else 1)
    elif damage == "corrupt":  # what is decompressed may be broken before the file is known to be
        assert "unreadable file" in last or "broken JSON" in last or "bad UTF-8" in last
    else:
        assert last.startswith(f"{path}: unreadable file")


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_an_empty_compressed_file_is_truncated(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    path.touch()
    assert messages(piece_of(path)) == [f"{path}: truncated file: the compressed data ends after it"]


def test_suffixes_in_capitals_are_suffixes(tmp_path: Path) -> None:
    path = tmp_path / "A.JSONL.GZ"
    path.write_bytes(gzip.compress(json_lines(["a", "b"])))
    assert [texts for _, texts in read(piece_of(path))] == [["a"], ["b"]]


def test_long_windows_of_zstd(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=28, enable_ldm=True)
    frame = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    path.write_bytes(frame.compress(json_lines(["a"])) + frame.flush())
    assert [texts for _, texts in read(piece_of(path))] == [["a"]]


def test_a_file_that_became_shorter_ends_the_job(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines(["a", "b", "c"]))
    piece = piece_of(path)
    path.write_bytes(json_lines(["a", "b"]))
    with pytest.raises(ValueError, match="ended at byte .* of .*: it changed while it was read"):
        read(piece)


def test_a_json_array_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[\n {"text": "a"}\n]\n')
    assert messages(piece_of(path))[0] == (
        f"{path} line 1: no JSON object: a JSON array; what is read is one object a line"
    )


def test_text_files(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("a\r\né".encode())
    assert read(piece_of(path)) == [(1, ["a\r\né"])]
    path.write_bytes(b"\xef\xbb\xbfmarked")
    assert read(piece_of(path)) == [(1, ["marked"])]
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"zipped"))
    assert read(piece_of(tmp_path / "a.txt.gz")) == [(1, ["zipped"])]
    for content, said in [
        (b"", "empty document"),
        (b"a\xffb", "bad UTF-8: byte 0xFF at byte 1"),
        (b"a" * 1001, "longer than --max-document-bytes 1000: 1001 bytes"),
    ]:
        path.write_bytes(content)
        assert messages(piece_of(path)) == [f"{path}: {said}"]
    path.unlink()
    assert messages(Piece("text", str(path), 0, 1, 1)) == [
        f"{path}: unreadable file: No such file or directory"
    ]


def bad_utf8_table() -> Any:
    """Five rows, the third of which is no UTF-8."""
    values = [b"a", "é".encode(), b"b\xffc", b"d", b"e"]
    return pyarrow.table({"text": pyarrow.array(values, pyarrow.binary()).view(pyarrow.string())})


@pytest.mark.parametrize("kind", ["parquet", "dataset"])
def test_bad_utf8_in_tables_is_that_rows(kind: str, tmp_path: Path) -> None:
    path, dataset = tmp_path / "a.parquet", None
    if kind == "parquet":
        parquet.write_table(bad_utf8_table(), path)
        piece = piece_of(path)
    else:
        dataset = datasets.Dataset(bad_utf8_table())
        piece = Piece("dataset", "set", 0, 5, 100)
    found = list(records(piece, ["text"], LIMIT, Position(), dataset))
    assert [number for number, _ in found] == [1, 2, 3, 4, 5]
    assert [content["text"] for _, content in found if isinstance(content, dict)] == ["a", "é", "d", "e"]
    assert found[2][1] == Bad("bad UTF-8", "byte 0xFF at byte 1")


@pytest.mark.parametrize("ends", [(7,), (1, 7), (3, 4, 7), (1, 2, 3, 4, 5, 6, 7)])
def test_a_damaged_row_group_costs_its_own_rows_however_the_file_is_cut(
    ends: tuple[int, ...], tmp_path: Path
) -> None:
    path = tmp_path / "a.parquet"
    texts = [f"{i} {os.urandom(40).hex()}" for i in range(70)]
    parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=10, compression="zstd")
    column = parquet.ParquetFile(path).metadata.row_group(3).column(0)
    content = bytearray(path.read_bytes())
    begin = column.dictionary_page_offset or column.data_page_offset
    content[begin : begin + column.total_compressed_size] = bytes(column.total_compressed_size)
    path.write_bytes(content)
    found, begin = [], 0
    for end in ends:
        found += records(Piece("parquet", str(path), begin, end, 10), ["text"], LIMIT, Position())
        begin = end
    good = [(number, content["text"]) for number, content in found if isinstance(content, dict)]
    assert good == [(i + 1, text) for i, text in enumerate(texts) if not 30 <= i < 40]
    (bad,) = [content for _, content in found if isinstance(content, Bad)]
    assert bad.reason == "unreadable rows" and bad.detail.startswith("rows 31 to 40: ")


def test_bad_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, {"txt": ["a"], "id": [1]})
    assert messages(piece_of(path)) == [f"{path}: no column text: its columns are txt, id; did you mean txt?"]
    write_parquet(path, {"text": ["a", None, ""], "id": [1, 2, 3]})
    assert messages(piece_of(path)) == [
        f"{path} row 2: text is no text: it is null",
        f"{path} row 3: empty document",
    ]
    assert messages(piece_of(path), "id")[0] == f"{path} row 1: id is no text: it is a number"
    path.write_bytes(path.read_bytes()[:-20])
    assert f"{path}: unreadable file: " in messages(Piece("parquet", str(path), 0, 1, 1))[0]
    path.write_bytes(b"")
    assert f"{path}: unreadable file: " in messages(Piece("parquet", str(path), 0, 1, 1))[0]


def test_only_needed_columns_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, {"text": ["a"], "id": [1], "system": ["s"]})
    keys = ("messages", "system")
    assert list(records(piece_of(path), keys, LIMIT, Position(), need_all=False)) == [(1, {"system": "s"})]
    assert isinstance(next(records(piece_of(path), keys, LIMIT, Position()))[1], Bad)


def test_texts_for_training_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"a": "1", "b": "2"}) + "\n" + json.dumps({"a": "3"}) + "\n")
    write_parquet(tmp_path / "b.parquet", {"a": ["4"], "b": ["5"]})
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"6"))
    inputs = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.parquet")]
    assert list(sources.texts([*inputs, str(tmp_path / "c.txt.gz")], ["a"])) == ["1", "3", "4", "6"]
    assert list(sources.texts(inputs, ["a"])) == ["1", "3", "4"]
    assert list(sources.texts(inputs, ["b", "a"], on_error="skip")) == ["2", "1", "5", "4"]
    with pytest.raises(ValueError, match=r"a\.jsonl line 2: missing key b"):
        list(sources.texts(inputs, ["b"]))
