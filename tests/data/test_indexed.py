import hashlib
import json
import os
import pickle
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

with warnings.catch_warnings():  # it misses packages that it does not need for this
    warnings.simplefilter("ignore")
    from megatron.core.datasets import indexed_dataset

from megatsp.data import index_file
from megatsp.data.indexed import IndexedDocuments, IndexedWriter
from megatsp.data.tokenizer import ByteTokenizer


def read(corpus: IndexedDocuments, document: int) -> list[int]:
    return corpus.tokens(document, 0, int(corpus.sizes[document])).tolist()


def use(prefix: Path) -> None:
    """Opens it and looks at all that is checked."""
    assert IndexedDocuments(prefix).sizes is not None


def write(prefix: Path, documents: list[list[int]]) -> None:
    with IndexedWriter(prefix, ByteTokenizer(), source="made by a test") as writer:
        for number, ids in enumerate(documents):
            writer.add(f"document {number}", ids, len(ids))


def test_round_trip_appends_eod_and_records_the_corpus(tmp_path: Path) -> None:
    documents = [[7], [1, 2, 3], list(range(256))]
    write(tmp_path / "new" / "a.b", documents)
    corpus = IndexedDocuments(tmp_path / "new" / "a.b")
    assert [read(corpus, i) for i in range(corpus.num_documents)] == [[*ids, 256] for ids in documents]
    assert corpus.tokens(1, 1, 3).tolist() == [2, 3]
    assert corpus.sizes.tolist() == [2, 4, 257] and not corpus.sizes.flags.writeable
    assert corpus.info and corpus.name(2) == "document 2 document 0"
    assert (corpus.num_documents, corpus.num_tokens, corpus.has_roles) == (3, 263, False)
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


@pytest.mark.parametrize("vocab_size, code, itemsize", [(65499, 8, 2), (65500, 4, 4)])
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
    assert corpus.info and read(corpus, 0) == [vocab_size - 1, 256]
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
    with pytest.raises(ValueError, match=r"data\.idx is missing"):
        IndexedDocuments(tmp_path / "data")


def test_nothing_under_the_final_names_before_the_block_ends(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "data", ByteTokenizer()) as writer:
        writer.add("document", [1], 1)
        assert all(path.name.endswith(".tmp") for path in tmp_path.iterdir())
    names = {"data.bin", "data.idx", "data.inputs", "data.json"}
    assert {path.name for path in tmp_path.iterdir()} == names


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
        (26, b"\x02", "truncated or damaged"),
        (26, b"\x00", "no documents"),
        (34, b"\x00", "contradict"),
        (42, b"\x01", "contradict"),
        (58, b"\x01", "contradict"),
        (66, b"\x07", "contradict"),
        (74, b"\x03", "contradict"),
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
        use(tmp_path / "data")


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
    with pytest.raises(ValueError, match="lacks eod"):
        IndexedDocuments(tmp_path / "data")
    path.write_text(json.dumps(content | {"sizes_sha256": "0" * 64, "more": [1]}))
    with pytest.raises(ValueError, match="other sizes"):
        use(tmp_path / "data")


def test_roles_and_documents_without_eod(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "data", ByteTokenizer(), roles=True) as writer:
        writer.add("a.jsonl", [1, 2, 3], 3, roles=np.array([0, 1, 2]))
        writer.add("a.jsonl", [4], 1, roles=np.array([0], dtype=np.uint8), eod=False)
        writer.add("b\n\udcff.jsonl", [5], 1, roles=np.array([2]), eod=False)
    corpus = pickle.loads(pickle.dumps(IndexedDocuments(tmp_path / "data")))
    assert corpus.has_roles
    assert [read(corpus, i) for i in range(3)] == [[1, 2, 3, 256], [4], [5]]
    assert [corpus.roles(i, 0, int(corpus.sizes[i])).tolist() for i in range(3)] == [[0, 1, 2, 2], [0], [2]]
    assert corpus.name(1) == "a.jsonl document 1"
    assert corpus.name(2) == "b\\n\udcff.jsonl document 0"
    assert (tmp_path / "data.inputs").read_bytes() == b"0\ta.jsonl\n2\tb\\n\xff.jsonl\n"
    (tmp_path / "data.roles").write_bytes(b"\x00" * 5)
    with pytest.raises(ValueError, match=r"data\.roles is truncated"):
        IndexedDocuments(tmp_path / "data")
    (tmp_path / "data.roles").unlink()
    with pytest.raises(ValueError, match=r"data\.roles is missing"):
        IndexedDocuments(tmp_path / "data")


@pytest.mark.parametrize("roles", [None, np.array([1]), np.array([1, 3])])
def test_bad_roles(tmp_path: Path, roles: np.ndarray | None) -> None:
    writer = IndexedWriter(tmp_path / "data", ByteTokenizer(), roles=True)
    with pytest.raises(ValueError, match=r"'a' has \d roles for 2 tokens"), writer:
        writer.add("a", [1, 2], 2, roles=roles)


def test_roles_of_a_corpus_without(tmp_path: Path) -> None:
    write(tmp_path / "data", [[1], [2]])
    with pytest.raises(ValueError, match="does not say who speaks"):
        IndexedDocuments(tmp_path / "data").roles(0, 0, 1)


def test_tokens_that_are_not_there(tmp_path: Path) -> None:
    write(tmp_path / "data", [[1], [2]])
    corpus = IndexedDocuments(tmp_path / "data")
    for document, start, stop in [(2, 0, 1), (-1, 0, 1), (0, 1, 3), (0, -1, 1), (0, 2, 1)]:
        with pytest.raises(IndexError):
            corpus.tokens(document, start, stop)


# Megatron's own reader and writer.

DOCUMENTS = [[[5, 6], [7]], [[1, 2, 3]], [[9]]]


def megatron(prefix: Path, dtype: type, documents: list[list[list[int]]], multimodal: bool = False) -> None:
    builder = indexed_dataset.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype, multimodal=multimodal)
    for sequences in documents:
        for ids in sequences:
            builder.add_item(torch.tensor(ids, dtype=torch.int64))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")


def flat(documents: list[list[list[int]]]) -> list[list[int]]:
    return [[i for ids in sequences for i in ids] for sequences in documents]


@pytest.mark.parametrize("vocab_size", [257, 65499, 65500])
def test_megatron_reads_ours(tmp_path: Path, vocab_size: int) -> None:
    tokenizer = ByteTokenizer()
    tokenizer.token_bytes += [b"x"] * (vocab_size - 257)
    with IndexedWriter(tmp_path / "data", tokenizer) as writer:
        writer.add("a", [vocab_size - 1, 0], 2)
        writer.add("a", [3], 1, eod=False)
    theirs = indexed_dataset.IndexedDataset(str(tmp_path / "data"))
    assert [theirs[i].tolist() for i in range(len(theirs))] == [[vocab_size - 1, 0, 256], [3]]
    assert theirs.document_indices.tolist() == [0, 1, 2]
    assert theirs.index.dtype == indexed_dataset.DType.optimal_dtype(vocab_size)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.int32, np.int64, np.uint16])
def test_megatrons_are_read(tmp_path: Path, dtype: type) -> None:
    megatron(tmp_path / "data", dtype, DOCUMENTS)
    corpus = IndexedDocuments(tmp_path / "data")
    assert corpus.info is None and not corpus.has_roles and corpus.dtype == dtype
    assert [read(corpus, i) for i in range(3)] == flat(DOCUMENTS)
    assert corpus.tokens(0, 1, 3).tolist() == [6, 7]
    assert (corpus.num_documents, corpus.num_tokens) == (3, 7)
    assert corpus.name(1) == f"{tmp_path}/data document 1"


def test_empty_sequences_and_documents_of_megatrons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents: list[list[list[int]]] = [[[1]], [], [[], [2, 3]], [[]], [[4], [5]], []]
    megatron(tmp_path / "data", np.int32, documents)
    corpus = IndexedDocuments(tmp_path / "data")
    assert [read(corpus, i) for i in range(6)] == flat(documents)
    for chunk in (1, 2, 3):
        monkeypatch.setattr(index_file, "CHUNK", chunk)
        again = IndexedDocuments(tmp_path / "data")
        assert again.sizes.tolist() == [1, 0, 2, 0, 2, 0] == corpus.sizes.tolist()
        assert again.sizes_sha256 == corpus.sizes_sha256


def test_merged_by_megatron(tmp_path: Path) -> None:
    megatron(tmp_path / "a", np.uint16, DOCUMENTS)
    write(tmp_path / "b", [[1, 2], [3]])
    builder = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "both.bin"), dtype=np.uint16)
    for part in "ab":
        builder.add_index(str(tmp_path / part))
    builder.finalize(str(tmp_path / "both.idx"))
    corpus = IndexedDocuments(tmp_path / "both")
    assert [read(corpus, i) for i in range(5)] == [*flat(DOCUMENTS), [1, 2, 256], [3, 256]]


def test_the_digest_of_sizes_does_not_depend_on_who_wrote(tmp_path: Path) -> None:
    write(tmp_path / "ours", [[1, 2], [3]])
    megatron(tmp_path / "theirs", np.int32, [[[1, 2, 9]], [[3], [9]]])
    ours, theirs = IndexedDocuments(tmp_path / "ours"), IndexedDocuments(tmp_path / "theirs")
    assert ours.sizes_sha256 == theirs.sizes_sha256 == hashlib.sha256(struct.pack("<2q", 3, 2)).hexdigest()


def test_what_of_megatrons_is_refused(tmp_path: Path) -> None:
    megatron(tmp_path / "modes", np.int32, DOCUMENTS, multimodal=True)
    with pytest.raises(ValueError, match="multimodal"):
        IndexedDocuments(tmp_path / "modes")
    megatron(tmp_path / "none", np.int32, [])
    with pytest.raises(ValueError, match="no documents"):
        IndexedDocuments(tmp_path / "none")
    megatron(tmp_path / "empty", np.int32, [[[]], []])
    with pytest.raises(ValueError, match="no tokens in 2 documents"):
        IndexedDocuments(tmp_path / "empty")
    megatron(tmp_path / "open", np.int32, DOCUMENTS)
    content = bytearray((tmp_path / "open.idx").read_bytes())
    content[-8:] = struct.pack("<q", 3)  # as without the last end_document
    (tmp_path / "open.idx").write_bytes(content)
    with pytest.raises(ValueError, match="sequences 0 to 3 of 4"):
        IndexedDocuments(tmp_path / "open")
    megatron(tmp_path / "gap", np.int32, DOCUMENTS)
    content = bytearray((tmp_path / "gap.idx").read_bytes())
    content[34 + 16 + 8 : 34 + 16 + 16] = struct.pack("<q", 12)  # the second sequence where the third is
    (tmp_path / "gap.idx").write_bytes(content)
    with pytest.raises(ValueError, match="not contiguous: sequence 1 is at byte 12, .* end at 8"):
        use(tmp_path / "gap")
