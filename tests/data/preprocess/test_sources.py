import gzip
import json
import os
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import zstandard
from preprocess_jobs import TEXTS, json_lines, setup, write_inputs, write_parquet
from pyarrow import parquet

from megatsp.data.preprocess import sources
from megatsp.data.preprocess.inputs import kind_of
from megatsp.data.preprocess.part import BadRecord, write_part
from megatsp.data.preprocess.sources import Bad, Piece, Position, message, num_row_groups, records, texts_of
from megatsp.data.tokenizer import ByteTokenizer

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


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst", "txt.gz", "txt.zst"])
def test_an_empty_compressed_file_is_truncated(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{kind}"
    path.write_bytes(b"")
    assert messages(piece_of(path)) == [f"{path}: truncated file: the compressed data ends at once"]
    path.write_bytes(gzip.compress(b"") if kind.endswith("gz") else zstandard.compress(b""))
    assert [bad.split(": ")[1] for bad in messages(piece_of(path))] == ["empty document"] * ("txt" in kind)


def test_suffixes_in_upper_case(tmp_path: Path) -> None:
    (tmp_path / "A.JSONL.GZ").write_bytes(gzip.compress(json_lines(["a"])))
    assert read(piece_of(tmp_path / "A.JSONL.GZ")) == [(1, ["a"])]


def test_zstd_with_a_long_window(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=False, hash_log=6, chain_log=6)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    content = compressor.compress(json_lines(["a"])) + compressor.flush()
    assert zstandard.get_frame_parameters(content).window_size == 1 << 28
    (tmp_path / "a.jsonl.zst").write_bytes(content)
    assert read(piece_of(tmp_path / "a.jsonl.zst")) == [(1, ["a"])]


@pytest.mark.parametrize(
    "content", [b'[{"text": "a"}, {"text": "b"}]', b'[\n{"text": "a"},\n{"text": "b"}\n]', b"[" * 8000]
)
def test_a_json_array(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "BATCH_BYTES", 1000)
    path = tmp_path / "a.json"
    path.write_bytes(b"\xef\xbb\xbf" + content)
    assert messages(piece_of(path))[0].endswith(": a JSON array; one object a line is read")


def test_text_files(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("a\r\né".encode())
    assert read(piece_of(path)) == [(1, ["a\r\né"])]
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"zipped"))
    assert read(piece_of(tmp_path / "a.txt.gz")) == [(1, ["zipped"])]
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"a" * 1001))
    said = "longer than --max-document-bytes 1000: when decompressed"
    assert messages(piece_of(tmp_path / "a.txt.gz")) == [f"{tmp_path}/a.txt.gz: {said}"]
    path.write_bytes(b"\xef\xbb\xbfmarked")
    assert read(piece_of(path)) == [(1, ["marked"])]
    for content, said in [
        (b"", "empty document"),
        (b"a\xffb", "bad UTF-8: byte 0xFF at byte 1"),
        (b"\xef\xbb\xbf", "empty document"),
        (b"a" * 1001, "longer than --max-document-bytes 1000: 1001 bytes"),
    ]:
        path.write_bytes(content)
        assert messages(piece_of(path)) == [f"{path}: {said}"]
    path.unlink()
    assert messages(Piece("text", str(path), 0, 1, 1)) == [
        f"{path}: unreadable file: No such file or directory"
    ]


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
    assert "a.parquet: unreadable file: " in messages(Piece("parquet", str(path), 0, 1, 1))[0]
    path.write_bytes(b"")
    assert "a.parquet: unreadable file: " in messages(Piece("parquet", str(path), 0, 1, 1))[0]


def bad_utf_8() -> pyarrow.Table:
    """Three texts, of which the second is none."""
    offsets = pyarrow.array([0, 1, 4, 5], pyarrow.int32()).buffers()[1]
    texts = pyarrow.Array.from_buffers(
        pyarrow.string(), 3, [None, offsets, pyarrow.py_buffer(b"a\xc3\xa9\xffb")]
    )
    return pyarrow.table({"text": texts})


@pytest.mark.parametrize("kind", ["parquet", "dataset"])
def test_bad_utf_8_in_tables(kind: str, tmp_path: Path) -> None:
    path, dataset = tmp_path / "a.parquet", None
    if kind == "parquet":
        parquet.write_table(bad_utf_8(), path)
        piece = piece_of(path)
    else:
        import datasets

        dataset, piece = datasets.Dataset(bad_utf_8()), Piece(kind, "name[train]", 0, 3, 10)
    said = "bad UTF-8: byte 0xFF at byte 2 of a text"
    assert [number for number, _ in read(piece, dataset=dataset)] == [1, 2, 3]
    assert [texts for _, texts in read(piece, dataset=dataset) if isinstance(texts, list)] == [["a"], ["b"]]
    assert messages(piece, dataset=dataset) == [f"{piece.path} row 2: {said}"]
    with pytest.raises(BadRecord, match=f"row 2: {said}"):
        write_part(setup(tmp_path, dataset=dataset), ByteTokenizer(), None, 0, [piece])
    job = setup(tmp_path, dataset=dataset, skip=True)
    part = write_part(job, ByteTokenizer(), None, 0, [piece])
    assert part.rejects == {"bad UTF-8": 1} and part.counts["text"].documents == 2


def test_rows_that_a_data_set_cannot_give(tmp_path: Path) -> None:
    class Broken:
        column_names = ("text",)

        def select_columns(self, _: Any) -> "Broken":
            return self

        with_format = select_columns

        def __getitem__(self, rows: slice) -> Any:
            if rows.start <= 1 < rows.stop:
                raise pyarrow.ArrowInvalid("it is broken")
            return {"text": [f"row {rows.start}"]}

    piece = Piece("dataset", "name[train]", 0, 3, 10)
    assert [texts for _, texts in read(piece, dataset=Broken())] == [
        ["row 0"],
        Bad("unreadable row", "it is broken"),
        ["row 2"],
    ]


def test_a_row_group_that_is_broken_costs_itself(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, {"text": TEXTS, "id": list(range(len(TEXTS)))})
    with parquet.ParquetFile(path) as file:
        chunk = file.metadata.row_group(3).column(0)
    content = bytearray(path.read_bytes())
    begin = chunk.dictionary_page_offset or chunk.data_page_offset
    content[begin : begin + chunk.total_compressed_size] = bytes(chunk.total_compressed_size)
    path.write_bytes(content)
    found = read(piece_of(path))
    assert [texts for _, texts in found if isinstance(texts, list)] == [[t] for t in TEXTS[:21] + TEXTS[28:]]
    assert [number for number, _ in found] == [*range(1, 22), 0, *range(29, 61)]
    (said,) = messages(piece_of(path))
    assert said.startswith(f"{path}: unreadable rows: rows 22 to 28 cannot be read: ")
    assert read(piece_of(path, 2, 5)) == [(n, t) for n, t in found if 15 <= n <= 35 or not n]


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
