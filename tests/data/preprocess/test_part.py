import errno
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from preprocess_jobs import json_lines, setup

from megatsp.data import token_files
from megatsp.data.preprocess.part import BadRecord, Setup, path_of, read_part, write_part
from megatsp.data.preprocess.sources import Piece
from megatsp.data.tokenizer import ByteTokenizer

VOCAB_SIZE = 257


class Reject(ValueError):
    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


class FakeRenderer:
    """What the user says is not the assistant's, and what the assistant says is."""

    def render(self, record: dict[str, Any]) -> Any:
        if not isinstance(record.get("messages"), list):
            raise Reject("missing key: messages", "the record has " + ", ".join(record))
        if record["messages"] == ["mistake"]:
            raise ValueError("no template")
        text = "".join(record["messages"])
        ids = list(text.encode())
        roles = np.full(len(ids), 2, dtype=np.uint8)
        return type("Rendered", (), {"ids": ids, "roles": roles, "num_bytes": len(ids)})


def piece_of(folder: Path, content: bytes) -> Piece:
    path = folder / "in.jsonl"
    path.write_bytes(content)
    return Piece("jsonl", str(path), 0, len(content), len(content))


def tokens(job: Setup, index: int = 0, output: str = "text") -> np.ndarray:
    return np.fromfile(path_of(job.folder, index, output)(".bin"), dtype="<u2")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"in.jsonl"}


def test_a_partition_is_tokens_sizes_and_a_mark(tmp_path: Path) -> None:
    job = setup(tmp_path, append_eod=True)
    part = write_part(job, ByteTokenizer(), None, 3, [piece_of(tmp_path, json_lines(["ab", "é"]))])
    assert names(tmp_path) == {
        "000003_text.bin",
        "000003_text.sizes",
        "000003_text.inputs",
        "000003.json",
    }
    assert tokens(job, 3).tolist() == [97, 98, 256, 0xC3, 0xA9, 256]
    counts = part.counts["text"]
    assert (counts.documents, counts.tokens, counts.bytes, counts.max_token_id) == (2, 6, 4, 256)
    assert read_part(job, 3, VOCAB_SIZE) == part
    assert read_part(job, 2, VOCAB_SIZE) is None
    assert read_part(job, 3, 70_000) is None  # ids would be wider
    inputs = (tmp_path / "000003_text.inputs").read_bytes()
    (tmp_path / "000003_text.inputs").write_bytes(b"")
    assert read_part(job, 3, VOCAB_SIZE) is None
    (tmp_path / "000003_text.inputs").write_bytes(inputs)
    (tmp_path / "000003_text.sizes").write_bytes(b"")
    assert read_part(job, 3, VOCAB_SIZE) is None
    (tmp_path / "000003.json").write_text("{")
    assert read_part(job, 3, VOCAB_SIZE) is None


def test_a_bad_record_ends_it_or_is_counted(tmp_path: Path) -> None:
    piece = piece_of(tmp_path, b'{"text": "a"}\n{"text": ""}\n{"text": "b"}\n{"text": 1}\n{"text": ""}\n')
    with pytest.raises(BadRecord, match=r"in\.jsonl line 2: empty document"):
        write_part(setup(tmp_path), ByteTokenizer(), None, 0, [piece])
    assert names(tmp_path) == set()
    job = setup(tmp_path, skip=True)
    part = write_part(job, ByteTokenizer(), None, 0, [piece])
    assert bytes(tokens(job).astype("u1")) == b"ab"
    assert part.rejects == {"empty document": 2, "text is no text": 1}
    assert [example.partition("in.jsonl ")[2] for example in part.examples] == [
        "line 2: empty document",
        "line 4: text is no text: it is a number",
        "line 5: empty document",
    ]


def test_a_record_is_in_all_outputs_or_in_none(tmp_path: Path) -> None:
    records = [{"a": "1", "b": "x"}, {"a": "2"}, {"a": "3", "b": ""}, {"b": "y", "a": "4"}]
    piece = piece_of(tmp_path, "\n".join(map(json.dumps, records)).encode())
    job = setup(tmp_path, json_keys=("a", "b"), skip=True)
    part = write_part(job, ByteTokenizer(), None, 0, [piece])
    assert bytes(tokens(job, output="a").astype("u1")) == b"14"
    assert bytes(tokens(job, output="b").astype("u1")) == b"xy"
    assert part.counts["a"].documents == part.counts["b"].documents == 2


@pytest.mark.parametrize("made, reason", [([], "no tokens"), ([5, 257], "ids outside the vocabulary")])
@pytest.mark.parametrize("skip", [True, False])
def test_what_a_tokenizer_may_do(tmp_path: Path, made: list[int], reason: str, skip: bool) -> None:
    class Odd(ByteTokenizer):
        def encode_batch(self, texts: Any) -> Any:
            return [made if text == "odd" else list(text.encode()) for text in texts]

    piece, job = piece_of(tmp_path, json_lines(["a", "odd", "b"])), setup(tmp_path, skip=skip)
    if skip:
        assert write_part(job, Odd(), None, 0, [piece]).rejects == {reason: 1}
        assert bytes(tokens(job).astype("u1")) == b"ab"
    else:
        with pytest.raises(BadRecord, match=rf"in\.jsonl line 2: {reason}"):
            write_part(job, Odd(), None, 0, [piece])


def test_batches_are_bounded_by_bytes_and_documents(tmp_path: Path) -> None:
    batches: list[list[int]] = []

    class Watched(ByteTokenizer):
        def encode_batch(self, texts: Any) -> Any:
            batches.append([len(text) for text in texts])
            return super().encode_batch(texts)

    texts = ["a"] * 3000 + ["b" * 900_000] * 3 + ["c" * 3_000_000, "d"]
    piece, job = piece_of(tmp_path, json_lines(texts)), setup(tmp_path, max_document_bytes=1 << 22)
    reported: list[int] = []
    part = write_part(job, Watched(), None, 0, [piece], lambda p: reported.append(p.input_bytes))
    assert [size for batch in batches for size in batch] == [len(text) for text in texts]
    assert all(len(batch) <= 1024 and (len(batch) == 1 or sum(batch) <= 2 << 20) for batch in batches)
    assert reported == sorted(reported) and len(reported) >= 4 and part.input_bytes == piece.bytes


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.BytesIO):
        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    def open_full(path: str, mode: str) -> Any:
        return Full() if ".bin." in path else open(path, mode)

    monkeypatch.setattr(token_files, "open", open_full, raising=False)
    with pytest.raises(OSError, match="No space left") as raised:
        write_part(setup(tmp_path), ByteTokenizer(), None, 0, [piece_of(tmp_path, json_lines(["a"]))])
    assert raised.value.errno == errno.ENOSPC and names(tmp_path) == set()


def test_conversations(tmp_path: Path) -> None:
    lines = [{"messages": ["a", "b"]}, {"text": "a"}, {"messages": ["c" * 1001]}, {"messages": []}]
    piece = piece_of(tmp_path, "\n".join(map(json.dumps, lines)).encode())
    job = setup(tmp_path, format="chat", skip=True)
    part = write_part(job, ByteTokenizer(), FakeRenderer(), 0, [piece])
    assert tokens(job, output="chat").tolist() == [97, 98]
    assert Path(path_of(job.folder, 0, "chat")(".roles")).read_bytes() == b"\x02\x02"
    assert part.rejects == {
        "missing key: messages": 1,
        "longer than --max-document-bytes 1000": 1,
        "no tokens": 1,
    }
    assert part.examples[0].endswith("line 2: missing key: messages: the record has text")
    with pytest.raises(BadRecord, match="line 2: missing key"):
        write_part(setup(tmp_path, format="chat"), ByteTokenizer(), FakeRenderer(), 1, [piece])
    piece = piece_of(tmp_path, b'{"messages": ["mistake"]}')
    with pytest.raises(ValueError, match="no template"):
        write_part(job, ByteTokenizer(), FakeRenderer(), 1, [piece])
