"""Trains byte-level tokenizers: the function for one BPE, and `megatsp preprocess train-tokenizer`."""

import argparse
import importlib
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatsp.data.tokenizer.base import EOD_NAMES
from megatsp.data.tokenizer.huggingface import HuggingFaceTokenizer
from megatsp.parser import Parser

if TYPE_CHECKING:
    import tokenizers

MODELS = ("bpe", "unigram")
MEASURED_BYTES = 4_000_000  # of the first texts: what bytes per token is measured on
_FILES = ("tokenizer.json", "tokenizer_config.json")
DESCRIPTION = """\
Trains a byte-level tokenizer: every text can be encoded and comes back as it was. Writes a folder that
data.tokenizer= and transformers.AutoTokenizer read. The ids are <|endoftext|>, the other special tokens,
then, for bpe, the 256 bytes and the merges; for unigram, the pieces, the likeliest first.
"""


def train_bpe(texts: Iterable[str], vocab_size: int, path: str | Path) -> HuggingFaceTokenizer:
    """Train a byte-level BPE on `texts`, save it at `path` and return it.

    The ids are `<|endoftext|>` (0), the 256 bytes, then merges. The file appears whole or not at all.

    Raises:
        ValueError: vocab_size is below 257, or the texts are too small for so many tokens.
    """
    content = train(texts, "bpe", vocab_size).to_str().encode("utf-8")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
    return HuggingFaceTokenizer({"tokenizer.json": content}, str(path))


def train(
    texts: Iterable[str],
    model: str,
    vocab_size: int,
    special_tokens: tuple[str, ...] = (),
    min_frequency: int = 0,
) -> "tokenizers.Tokenizer":
    """A byte-level tokenizer of exactly `vocab_size` ids, trained on `texts`.

    Args:
        model: of MODELS.
        special_tokens: beside `<|endoftext|>`, which has id 0.
        min_frequency: bpe merges only pairs that occur so often.

    Raises:
        ValueError: vocab_size has no room for the bytes and the special tokens, or the texts are too small
        for it.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    specials = list(dict.fromkeys((EOD_NAMES[0], *special_tokens)))
    least = 256 + len(specials)
    if vocab_size < least:
        raise ValueError(
            f"vocab_size is {vocab_size}: a byte-level tokenizer needs {least}, the bytes and the special "
            f"tokens ({', '.join(specials)})"
        )
    settings: dict[str, Any] = {
        "vocab_size": vocab_size,
        "special_tokens": specials,
        "initial_alphabet": pre_tokenizers.ByteLevel.alphabet(),
        "show_progress": False,
    }
    if model == "bpe":
        backend = tokenizers.Tokenizer(models.BPE())
        trainer: Any = trainers.BpeTrainer(min_frequency=min_frequency, **settings)
    else:
        backend = tokenizers.Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(**settings)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(texts, trainer)
    found = backend.get_vocab_size()
    if found != vocab_size:
        raise ValueError(
            f"vocab_size is {vocab_size}, but these texts only give {found} tokens: "
            "lower vocab_size or give more text"
        )
    return backend


def main(arguments: list[str]) -> int:
    """`megatsp preprocess train-tokenizer`: reads the arguments, trains, and returns the exit status.

    Raises:
        ValueError: arguments that make no sense, no text, or output that is there already.
    """
    given = _parser().parse_args(arguments)
    _check(given)
    sample = _Sample(given.limit_bytes, given.limit_documents)
    read = importlib.import_module(
        "megatsp.data.preprocess.sources"
    ).texts  # it may import what we do not need
    texts = read(given.input, given.json_keys, given.on_error, given.input_type)
    specials = tuple(given.special_tokens)
    backend = train(sample.of(texts), given.model, given.vocab_size, specials, given.min_frequency or 0)
    files = {
        "tokenizer.json": backend.to_str(pretty=True).encode("utf-8"),
        "tokenizer_config.json": _config(specials),
    }
    tokenizer = HuggingFaceTokenizer(files, str(given.output))
    _write(given.output, files, given.force)
    tokens = sum(len(ids) for ids in tokenizer.encode_batch(sample.measured))
    measured = sum(len(text.encode("utf-8")) for text in sample.measured)
    print(f"wrote {given.output}: {given.model}, vocab_size {tokenizer.vocab_size}, eod {tokenizer.eod}")
    print(f"trained on {sample.documents:,} documents, {sample.num_bytes:,} bytes{sample.cut}")
    print(f"{measured / tokens:.3f} bytes per token on the first {measured:,} of these bytes")
    print(f"use: data.tokenizer={given.output} model.vocab_size={tokenizer.vocab_size}")
    return 0


class _Sample:
    """The texts up to a limit, counted; and the first of them, to measure on."""

    def __init__(self, limit_bytes: int | None, limit_documents: int | None) -> None:
        self._limit_bytes, self._limit_documents = limit_bytes, limit_documents
        self.documents = self.num_bytes = 0
        self.cut = ""
        self.measured: list[str] = []

    def of(self, texts: Iterable[str]) -> Iterator[str]:
        from tqdm import tqdm

        measured = 0
        with tqdm(unit="B", unit_scale=True, desc="reading", file=sys.stderr, mininterval=1.0) as progress:
            for text in texts:
                size = len(text.encode("utf-8"))
                over = self._limit_bytes is not None and self.num_bytes + size > self._limit_bytes
                if over or self.documents == self._limit_documents:
                    self.cut = f", up to --limit-{'bytes' if over else 'documents'}"
                    break
                self.documents += 1
                self.num_bytes += size
                if measured < MEASURED_BYTES:
                    self.measured.append(text)
                    measured += size
                progress.update(size)
                yield text
        if not self.num_bytes:
            raise ValueError(
                "the input holds no text" + (" that fits into --limit-bytes" if self.cut else "")
            )
        print(f"training on {self.documents:,} documents, {self.num_bytes:,} bytes", file=sys.stderr)


def _parser() -> Parser:
    parser = Parser(
        "megatsp preprocess train-tokenizer",
        DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="what `megatsp preprocess` reads: JSON lines (.gz, .zst), Parquet or text files, or folders",
    )
    add(
        "--input-type",
        choices=("auto", "jsonl", "parquet", "text"),
        default="auto",
        help="default: by each file's suffix",
    )
    add(
        "--json-keys",
        nargs="+",
        default=["text"],
        metavar="KEY",
        help="what of a JSON line is text (default: text)",
    )
    add("--model", choices=MODELS, default="bpe", help="default: bpe")
    add("--vocab-size", type=int, required=True, metavar="N", help="ids in all, special tokens included")
    add("--output", type=Path, required=True, metavar="FOLDER", help="the folder to write")
    add(
        "--special-tokens",
        nargs="+",
        default=[],
        metavar="TOKEN",
        help="beside <|endoftext|>, such as <|im_start|> <|im_end|>",
    )
    add(
        "--min-frequency",
        type=int,
        metavar="N",
        help="bpe: merge only pairs that occur so often (default: 0)",
    )
    add("--limit-bytes", type=int, metavar="N", help="train on the first documents up to so many bytes")
    add("--limit-documents", type=int, metavar="N", help="train on the first so many documents")
    add(
        "--on-error",
        choices=("fail", "skip"),
        default="fail",
        help="what a record without text, or one that cannot be read, does (default: fail)",
    )
    add("--force", action="store_true", help="replace a tokenizer that is there")
    return parser


def _check(given: argparse.Namespace) -> None:
    for option in ("min_frequency", "limit_bytes", "limit_documents"):
        value = getattr(given, option)
        if value is not None and value < 1:
            raise ValueError(f"--{option.replace('_', '-')} {value}: must be at least 1")
    if given.min_frequency is not None and given.model != "bpe":
        raise ValueError(f"--min-frequency goes with --model bpe, not with {given.model}")
    twice = sorted({token for token in given.special_tokens if given.special_tokens.count(token) > 1})
    if twice or "" in given.special_tokens:
        raise ValueError(f"--special-tokens: {twice[0] + ' is there twice' if twice else 'one is empty'}")
    if given.output.exists() or given.output.is_symlink():
        _check_replaceable(given.output, given.force)


def _check_replaceable(output: Path, force: bool) -> None:
    """Only a tokenizer of our making is ever replaced, and only if asked."""
    if not output.is_dir() or output.is_symlink():
        raise ValueError(f"--output {output} is there and is no folder: give another")
    names = {path.name for path in output.iterdir()}
    foreign = sorted(names - {*_FILES})
    if foreign:
        raise ValueError(f"--output {output} holds other files, such as {foreign[0]}: give another folder")
    if names and not force:
        raise ValueError(f"--output {output} holds a tokenizer: --force replaces it, or give another folder")


def _config(special_tokens: tuple[str, ...]) -> bytes:
    """A tokenizer_config.json with which transformers gives the ids of tokenizer.json."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOD_NAMES[0],
        "additional_special_tokens": [token for token in special_tokens if token != EOD_NAMES[0]],
        "clean_up_tokenization_spaces": False,
    }
    return json.dumps(config, indent=2, ensure_ascii=False).encode("utf-8") + b"\n"


def _write(output: Path, files: dict[str, bytes], force: bool) -> None:
    """The folder, whole or not at all."""
    temporary = output.with_name(f"{output.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        for name, content in files.items():
            (temporary / name).write_bytes(content)
        if output.exists():
            _check_replaceable(output, force)  # again: training took its time
            shutil.rmtree(output)
        temporary.rename(output)
    except OSError as error:
        raise ValueError(f"cannot write --output {output}: {error.strerror}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
