import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest

from megatsp.data.indexed import IndexedDocuments, IndexedWriter
from megatsp.data.tokenizer import ByteTokenizer


def write(prefix: Path, documents: list[list[int]]) -> None:
    with IndexedWriter(prefix, ByteTokenizer(), source="made by a test") as writer:
        for number, ids in enumerate(documents):
            writer.add(f"document {number}", ids, len(ids))


def test_round_trip_appends_eod_and_records_the_corpus(tmp_path: Path) -> None:
    documents = [[7], [1, 2, 3], list(range(256))]
    write(tmp_path / "new" / "a.b", documents)
    corpus = IndexedDocuments(tmp_path / "new" / "a.b")
    assert [list(corpus[i]) for i in range(len(corpus))] == [[*ids, 256] for ids in documents]
    assert isinstance(corpus[1], np.memmap)
    assert corpus.info.names == ["document 0", "document 1", "document 2"]
    assert (corpus.info.documents, corpus.info.tokens, corpus.info.bytes) == (3, 263, 260)
    assert (corpus.info.vocab_size, corpus.info.eod, corpus.info.max_token_id) == (257, 256, 256)
    assert (corpus.info.tokenizer, corpus.info.source) == ("byte", "made by a test")
    assert corpus.info.tokenizer_fingerprint == ByteTokenizer().fingerprint


def test_files_are_megatrons_byte_for_byte(tmp_path: Path) -> None:
    write(tmp_path / "data", [[5], [1, 2]])
    assert (tmp_path / "data.bin").read_bytes() == b"\x05\x00\x00\x01" + b"\x01\x00\x02\x00\x00\x01"
    assert (tmp_path / "data.idx").read_bytes() == (
        b"MMIDIDX\x00\x00"
        + b"\x01\x00\x00\x00\x00\x00\x00\x00"  # version
        + b"\x08"  # uint16
        + b"\x02\x00\x00\x00\x00\x00\x00\x00"  # sequences
        + b"\x03\x00\x00\x00\x00\x00\x00\x00"  # document indices
        + b"\x02\x00\x00\x00\x03\x00\x00\x00"  # sizes
        + b"\x00\x00\x00\x00\x00\x00\x00\x00\x04\x00\x00\x00\x00\x00\x00\x00"  # pointers, in bytes
        + struct.pack("<3q", 0, 1, 2)  # document indices
    )


@pytest.mark.parametrize("vocab_size, code, itemsize", [(65536, 8, 2), (65537, 4, 4)])
def test_ids_are_as_wide_as_the_vocabulary_needs(
    tmp_path: Path, vocab_size: int, code: int, itemsize: int
) -> None:
    tokenizer = ByteTokenizer()
    tokenizer.token_bytes += [b"x"] * (vocab_size - 257)
    with IndexedWriter(tmp_path / "data", tokenizer) as writer:
        writer.add("document", [vocab_size - 1], 1)
    assert (tmp_path / "data.idx").read_bytes()[17] == code
    assert (tmp_path / "data.bin").stat().st_size == 2 * itemsize
    corpus = IndexedDocuments(tmp_path / "data")
    assert list(corpus[0]) == [vocab_size - 1, 256]
    assert corpus.info.max_token_id == vocab_size - 1


def test_an_exception_keeps_the_old_data_and_leaves_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "data", [[1], [2]])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(RuntimeError), IndexedWriter(tmp_path / "data", ByteTokenizer()) as writer:
        writer.add("other", [3], 1)
        raise RuntimeError
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_interruption_between_renames_does_not_mix_old_and_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "data", [[1], [2]])
    rename = os.replace

    def rename_only_the_bin(source: str, target: str) -> None:
        if not target.endswith(".bin"):
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "replace", rename_only_the_bin)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "data", [[3], [4]])  # as long as the old data: sizes would not tell them apart
    with pytest.raises(ValueError, match=r"data\.json is missing"):
        IndexedDocuments(tmp_path / "data")


def test_nothing_under_the_final_names_before_the_block_ends(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "data", ByteTokenizer()) as writer:
        writer.add("document", [1], 1)
        assert not {"data.bin", "data.idx", "data.json"} & {path.name for path in tmp_path.iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == {"data.bin", "data.idx", "data.json"}


def test_writing_no_document_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no document"), IndexedWriter(tmp_path / "data", ByteTokenizer()):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "ids, message", [([], "0 tokens"), ([0, 257], "ids from 0 to 257"), ([-1], "from -1")]
)
def test_bad_documents_are_named(tmp_path: Path, ids: list[int], message: str) -> None:
    expected = pytest.raises(ValueError, match=rf"'bad\.py'.*{message}")
    with expected, IndexedWriter(tmp_path / "data", ByteTokenizer()) as writer:
        writer.add("bad.py", ids, len(ids))


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".json"])
def test_missing_file(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / "data", [[1], [2]])
    (tmp_path / f"data{suffix}").unlink()
    with pytest.raises(ValueError, match=rf"data\{suffix} is missing"):
        IndexedDocuments(tmp_path / "data")


@pytest.mark.parametrize(
    "offset, value, message",
    [
        (0, b"X", "not a Megatron index"),
        (9, b"\x02", "version 2"),
        (17, b"\x07", "dtype code 7"),
        (17, b"\x04", "truncated or not the one"),
        (18, b"\x00", "no documents"),
        (26, b"\x02", "one sequence"),
        (26, b"\x04", "one sequence"),
        (34, b"\x00", "contradict"),
        (42, b"\x01", "contradict"),
        (58, b"\x01", "contradict"),
    ],
)
def test_damaged_index(tmp_path: Path, offset: int, value: bytes, message: str) -> None:
    write(tmp_path / "data", [[1], [2, 3]])
    content = (tmp_path / "data.idx").read_bytes()
    damaged = content[:offset] + value + content[offset + 1 :]
    if offset == 17 and value == b"\x04":  # int32: let the pointers agree, so that only the .bin does not
        damaged = damaged[:42] + struct.pack("<2q", 0, 8) + damaged[58:]
    (tmp_path / "data.idx").write_bytes(damaged)
    with pytest.raises(ValueError, match=message):
        IndexedDocuments(tmp_path / "data")


@pytest.mark.parametrize(
    "suffix, message", [(".bin", "data.bin is truncated"), (".idx", "truncated"), (".json", "not valid JSON")]
)
def test_truncated_file(tmp_path: Path, suffix: str, message: str) -> None:
    write(tmp_path / "data", [[1], [2]])
    path = tmp_path / f"data{suffix}"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=message):
        IndexedDocuments(tmp_path / "data")


@pytest.mark.parametrize(
    "suffix, message", [(".bin", "truncated"), (".idx", "not a Megatron"), (".json", "JSON")]
)
def test_empty_file(tmp_path: Path, suffix: str, message: str) -> None:
    write(tmp_path / "data", [[1], [2]])
    (tmp_path / f"data{suffix}").write_bytes(b"")
    with pytest.raises(ValueError, match=message):
        IndexedDocuments(tmp_path / "data")


def test_json_of_other_data(tmp_path: Path) -> None:
    write(tmp_path / "data", [[1], [2]])
    path = tmp_path / "data.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"tokens": 5}))
    with pytest.raises(ValueError, match="does not belong"):
        IndexedDocuments(tmp_path / "data")
    path.write_text(json.dumps({key: content[key] for key in content if key != "eod"}))
    with pytest.raises(ValueError, match="exactly the keys"):
        IndexedDocuments(tmp_path / "data")
