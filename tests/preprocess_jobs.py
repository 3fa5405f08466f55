"""Small inputs for `megatsp preprocess`, and its outputs as texts."""

import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import zstandard
from pyarrow import parquet

from megatsp.data.indexed import IndexedDocuments
from megatsp.data.preprocess.arguments import run as command
from megatsp.data.preprocess.part import Setup, write_part
from megatsp.data.preprocess.pool import Pool
from megatsp.data.preprocess.sources import Piece
from megatsp.data.preprocess.worker import Report
from megatsp.data.tokenizer import ByteTokenizer, load_tokenizer

TEXTS = [f"{'é' * (i % 3)}text {i}\n" + "word " * (i * 7 % 40) for i in range(60)]


class InlinePool(Pool):
    """Makes partitions in this process: quicker, and what a test patches is in force."""

    renderer: Any = None

    def run(
        self, partitions: Sequence[tuple[int, list[Piece]]], tick_s: float
    ) -> Iterator[tuple[int, Report | None]]:
        tokenizer = load_tokenizer(self._setup.tokenizer)
        for index, pieces in partitions:
            part = write_part(self._setup, tokenizer, self.renderer, index, pieces)
            yield index, Report(part, True)


def preprocess(prefix: Path, *arguments: object, status: int = 0) -> None:
    """`megatsp preprocess` with the byte tokenizer, in this process if run.Pool is InlinePool."""
    given = [str(argument) for argument in arguments]
    assert command(["--output-prefix", str(prefix), "--tokenizer", "byte", *given]) == status


def documents(prefix: Path, output: str = "text") -> list[str]:
    """The texts of an output."""
    corpus = IndexedDocuments(f"{prefix}_{output}_document")
    return [
        ByteTokenizer().decode(corpus.tokens(i, 0, int(corpus.sizes[i])).tolist())
        for i in range(corpus.num_documents)
    ]


def json_lines(texts: Sequence[str] = TEXTS, key: str = "text") -> bytes:
    """Some lines with other keys, some with escapes."""
    return b"".join(
        json.dumps({"id": i, key: text}, ensure_ascii=i % 2 == 0).encode() + b"\n"
        for i, text in enumerate(texts)
    )


def write_inputs(kind: str, folder: Path, texts: Sequence[str] = TEXTS) -> list[str]:
    """The texts as inputs of a kind; returns arguments of the command."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "folder":
        for i, text in enumerate(texts):
            (folder / f"{i // 25}").mkdir(exist_ok=True)
            (folder / f"{i // 25}" / f"{i:03}.{'md' if i % 2 else 'txt'}").write_bytes(text.encode())
        (folder / ".hidden").write_text("not read")
        return ["--input", str(folder)]
    if kind == "dataset":
        import datasets

        datasets.Dataset.from_dict({"id": list(range(len(texts))), "text": list(texts)}).save_to_disk(
            str(folder / "set")
        )
        return ["--dataset", str(folder / "set")]
    if kind == "several":
        (folder / "a.jsonl").write_bytes(json_lines(texts[:20]))
        write_inputs("parquet", folder, texts[20:40])
        (folder / "c.jsonl.gz").write_bytes(gzip.compress(json_lines(texts[40:])))
        return ["--input", str(folder / "a.jsonl"), str(folder / "*.parquet"), str(folder / "c.jsonl.gz")]
    path = folder / f"data.{kind}"
    if kind == "parquet":
        write_parquet(path, {"id": list(range(len(texts))), "text": list(texts)})
    else:
        content = json_lines(texts)
        if kind == "jsonl.gz":
            content = gzip.compress(content)
        if kind == "jsonl.zst":  # of two frames
            content = b"".join(zstandard.compress(part) for part in (content[:1000], content[1000:]))
        path.write_bytes(content)
    return ["--input", str(path)]


def write_parquet(path: Path, columns: dict[str, list[Any]], row_group_size: int = 7) -> None:
    """A file of several row groups."""
    parquet.write_table(pyarrow.table(columns), path, row_group_size=row_group_size)


def setup(folder: Path, **changes: Any) -> Setup:
    """Of a job with the byte tokenizer."""
    values: dict[str, Any] = dict(
        folder=str(folder), tokenizer="byte", fingerprint=ByteTokenizer().fingerprint, json_keys=("text",),
        format="text", chat_template=None, append_eod=False, skip=False, max_document_bytes=1000,
    )  # fmt: skip
    return Setup(**{**values, **changes})
