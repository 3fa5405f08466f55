"""One partition of a job: its records to tokens on the disk, all of them or, after an exception, none."""

import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatsp.data import token_files
from megatsp.data.index_file import DTYPE_OF_CODE, token_code
from megatsp.data.preprocess.sources import (
    BATCH_BYTES,
    Bad,
    Piece,
    Position,
    message,
    records,
    texts_of,
    too_long,
)
from megatsp.data.token_files import Counts, PathOf, TokenFiles
from megatsp.data.tokenizer import Tokenizer

TEXT_FORMAT = "text"
BATCH_DOCUMENTS = 1024
NUM_EXAMPLES = 5
# What a record of a chat format may hold. A table needs some of it; the renderer says what is missing.
COLUMNS = {
    "chat": ("messages", "conversations", "system", "tools"),
    "prompt": ("prompt", "completion", "tools"),
    "instruction": ("instruction", "input", "output"),
}


@dataclass(frozen=True)
class Setup:
    """What the partitions of a job have in common."""

    folder: str  # of the partitions
    tokenizer: str  # spec
    fingerprint: str  # that the tokenizer must have
    json_keys: tuple[str, ...]
    format: str
    chat_template: str | None
    append_eod: bool
    skip: bool  # bad records, which are counted; otherwise the first ends the job
    max_document_bytes: int
    dataset: Any = None

    @property
    def outputs(self) -> tuple[str, ...]:
        """What the outputs are called: the JSON keys, or the chat format."""
        return self.json_keys if self.format == TEXT_FORMAT else (self.format,)

    @property
    def roles(self) -> bool:
        """Whether the outputs say who speaks."""
        return self.format != TEXT_FORMAT


@dataclass
class Part:
    """What is known of a partition, at its end or so far."""

    counts: dict[str, Counts]  # by output
    rejects: dict[str, int] = field(default_factory=dict)  # by reason
    examples: list[str] = field(default_factory=list)
    input_bytes: int = 0
    seconds: float = 0.0
    inputs_bytes: dict[str, int] = field(default_factory=dict)  # of each output's .inputs, at the end


class BadRecord(Exception):
    """A record that ends the job. The text says where it is and what is wrong."""


def path_of(folder: str, index: int, output: str) -> PathOf:
    """Names of the files of a finished partition."""
    return lambda suffix: f"{folder}/{index:06d}_{output}{suffix}"


def read_part(setup: Setup, index: int, vocab_size: int) -> Part | None:
    """What is known of a finished partition; None if it is not finished or its files are not whole.

    One that left out bad records is not finished where such end the job.
    """
    itemsize = np.dtype(DTYPE_OF_CODE[token_code(vocab_size)]).itemsize
    try:
        content = json.loads(Path(_mark(setup, index)).read_bytes())
        content["counts"] = {output: Counts(**content["counts"][output]) for output in setup.outputs}
        for output, count in content["counts"].items():
            expected = {
                ".bin": count.tokens * itemsize,
                ".sizes": count.documents * 4,
                ".inputs": content["inputs_bytes"][output],
            }
            if setup.roles:
                expected[".roles"] = count.tokens
            path = path_of(setup.folder, index, output)
            if any(os.path.getsize(path(suffix)) != size for suffix, size in expected.items()):
                return None
        part = Part(**content)
        return part if setup.skip or not part.rejects else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_part(
    setup: Setup,
    tokenizer: Tokenizer,
    renderer: Any,
    index: int,
    pieces: Sequence[Piece],
    report: Callable[[Part], None] = lambda _: None,
) -> Part:
    """Tokenise a partition into files in setup.folder. Its .json, written last, marks it as finished.

    Args:
        renderer: the megatsp.data.sft.Renderer of a chat format.
        report: called after every batch with what was done so far.

    Raises:
        BadRecord: unless such are skipped.
        OSError: from writing, for example on a full disk.
    """
    finals = {output: path_of(setup.folder, index, output) for output in setup.outputs}
    temporaries = {output: _temporary(path) for output, path in finals.items()}
    mark = _mark(setup, index)
    code = token_code(tokenizer.vocab_size)
    try:
        with ExitStack() as stack:
            files = [
                stack.enter_context(TokenFiles(path, tokenizer.vocab_size, tokenizer.eod, code, setup.roles))
                for path in temporaries.values()
            ]
            part = _Writer(setup, tokenizer, renderer, files, report).write(pieces)
        for output, path in finals.items():
            part.inputs_bytes[output] = os.path.getsize(temporaries[output](".inputs"))
            for suffix in token_files.suffixes(setup.roles):
                os.replace(temporaries[output](suffix), path(suffix))
        with open(f"{mark}.tmp", "w", encoding="utf-8") as file:
            json.dump(asdict(part), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{mark}.tmp", mark)
    except OSError as error:
        if error.filename is None:  # what writes to an open file does not name it
            error.filename = f"{setup.folder}/{index:06d}_{setup.outputs[0]}.bin"
        raise
    finally:
        for path in temporaries.values():
            token_files.remove(path, setup.roles)
        Path(f"{mark}.tmp").unlink(missing_ok=True)
    return part


class _Writer:
    """Reads pieces, collects texts to a batch of about a megabyte, and writes their tokens."""

    def __init__(
        self,
        setup: Setup,
        tokenizer: Tokenizer,
        renderer: Any,
        files: Sequence[TokenFiles],
        report: Callable[[Part], None],
    ) -> None:
        self._setup, self._tokenizer, self._renderer, self._files = setup, tokenizer, renderer, files
        self._report = report
        self._part = Part({output: file.counts for output, file in zip(setup.outputs, files, strict=True)})
        self._batch: list[tuple[Piece, int, list[str], list[int]]] = []
        self._batch_bytes = 0

    def write(self, pieces: Sequence[Piece]) -> Part:
        setup, started = self._setup, time.perf_counter()
        keys = COLUMNS[setup.format] if setup.roles else setup.json_keys
        read_bytes = 0
        for piece in pieces:
            position = Position()
            for number, content in records(
                piece, keys, setup.max_document_bytes, position, setup.dataset, need_all=not setup.roles
            ):
                if isinstance(content, Bad):
                    self._reject(piece, number, content)
                elif setup.roles:
                    self._render(piece, number, content)
                else:
                    self._collect(piece, number, content)
                if self._batch_bytes >= BATCH_BYTES or len(self._batch) >= BATCH_DOCUMENTS:
                    self._flush()
                    self._part.input_bytes = read_bytes + position.bytes
                    self._part.seconds = time.perf_counter() - started
                    self._report(self._part)
            read_bytes += piece.bytes
        self._flush()
        return replace(self._part, input_bytes=read_bytes, seconds=time.perf_counter() - started)

    def _collect(self, piece: Piece, number: int, content: dict[str, Any] | str) -> None:
        texts = texts_of(content, self._setup.json_keys, self._setup.max_document_bytes)
        if isinstance(texts, Bad):
            self._reject(piece, number, texts)
            return
        num_bytes = [len(text) if text.isascii() else len(text.encode()) for text in texts]
        if self._batch_bytes + sum(num_bytes) > 2 * BATCH_BYTES:
            self._flush()
        self._batch.append((piece, number, texts, num_bytes))
        self._batch_bytes += sum(num_bytes)

    def _flush(self) -> None:
        encoded = [
            self._tokenizer.encode_batch([texts[key] for _, _, texts, _ in self._batch])
            for key in range(len(self._files) if self._batch else 0)
        ]
        for document, (piece, number, _, num_bytes) in enumerate(self._batch):
            ids = [_array(of_key[document]) for of_key in encoded]
            bad = next((found for found in map(self._fault, ids) if found), None)
            if bad:
                self._reject(piece, number, bad)
                continue
            for file, of_key, size in zip(self._files, ids, num_bytes, strict=True):
                file.add(piece.path, of_key, size, eod=self._setup.append_eod)
        self._batch, self._batch_bytes = [], 0

    def _render(self, piece: Piece, number: int, content: dict[str, Any] | str) -> None:
        try:
            rendered = self._renderer.render(content)
        except ValueError as error:
            reason = getattr(error, "reason", None)  # megatsp.data.sft.Reject; others are the user's mistakes
            if reason is None:
                raise
            self._reject(piece, number, Bad(reason, getattr(error, "detail", "")))
            return
        ids = _array(rendered.ids)
        bad = self._fault(ids)
        if rendered.num_bytes > self._setup.max_document_bytes:
            bad = too_long(rendered.num_bytes, self._setup.max_document_bytes)
        if bad:
            self._reject(piece, number, bad)
            return
        self._files[0].add(piece.path, ids, rendered.num_bytes, rendered.roles, eod=False)
        self._batch_bytes += rendered.num_bytes

    def _fault(self, ids: np.ndarray) -> Bad | None:
        if not ids.size:
            return Bad("no tokens", f"the {self._tokenizer.name} tokenizer makes none of it")
        low, high, size = int(ids.min()), int(ids.max()), self._tokenizer.vocab_size
        if low < 0 or high >= size:
            return Bad(
                "ids outside the vocabulary", f"ids from {low} to {high}, the tokenizer has 0 to {size - 1}"
            )
        return None

    def _reject(self, piece: Piece, number: int, bad: Bad) -> None:
        if not self._setup.skip:
            raise BadRecord(message(piece, number, bad))
        self._part.rejects[bad.reason] = self._part.rejects.get(bad.reason, 0) + 1
        if len(self._part.examples) < NUM_EXAMPLES:
            self._part.examples.append(message(piece, number, bad))


def _array(ids: Sequence[int] | np.ndarray) -> np.ndarray:
    if isinstance(ids, np.ndarray):
        return ids.astype(np.int64, copy=False)
    return np.fromiter(ids, np.int64, len(ids))  # in half the time of np.asarray


def _mark(setup: Setup, index: int) -> str:
    return f"{setup.folder}/{index:06d}.json"


def _temporary(path: PathOf) -> PathOf:
    return lambda suffix: f"{path(suffix)}.{os.getpid()}.tmp"
