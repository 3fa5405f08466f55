"""Tokenise the running Python's standard library: a small, real corpus that needs no download.

See README.md beside this file.
"""

import argparse
import hashlib
import os
import sys
import sysconfig
import time
from collections import Counter
from pathlib import Path

from megatsp.data.indexed import IndexedDocuments, IndexedWriter, read_info
from megatsp.data.sample_index import DocumentOrder
from megatsp.data.splits import split_documents
from megatsp.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer, train_bpe
from megatsp.schema import DataConfig, TrainerConfig

OUTPUT = "outputs/data/python_stdlib"
EXCLUDED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
EXCLUDED_PREFIXES = ("config-", "_sysconfigdata")  # records of how this machine's Python was built


def collect(source: Path) -> tuple[list[tuple[str, str]], Counter[str]]:
    """Python files under `source` as (relative path, text) in order of path, and why others were skipped.

    Raises:
        ValueError: `source` is no folder, or has no usable Python file.
    """
    if not source.is_dir():
        raise ValueError(f"--source {source} is not a folder")
    paths = []
    for folder, subfolders, files in os.walk(source):
        subfolders[:] = [name for name in subfolders if not is_excluded(name)]
        paths += [Path(folder, name) for name in files if name.endswith(".py") and not is_excluded(name)]
    documents, skipped = [], Counter[str]()
    for name, path in sorted((path.relative_to(source).as_posix(), path) for path in paths):
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            skipped["not UTF-8"] += 1
        except OSError:
            skipped["unreadable"] += 1
        else:
            if text:
                documents.append((name, text))
            else:
                skipped["empty"] += 1
    if not documents:
        raise ValueError(f"--source {source} has no usable .py file")
    return documents, skipped


def is_excluded(name: str) -> bool:
    """Whether a file or folder of this name is left out."""
    return name in EXCLUDED_FOLDERS or name.startswith(EXCLUDED_PREFIXES)


def fingerprint(documents: list[tuple[str, str]], options: argparse.Namespace) -> str:
    """sha256 of everything that the output depends on: names, texts and the options that matter."""
    digest = hashlib.sha256(f"python_stdlib 1 {options.tokenizer}".encode())
    if options.tokenizer == "bpe":
        digest.update(f" {options.vocab_size} {options.valid_fraction} {options.seed}".encode())
    for name, text in documents:
        for part in (os.fsencode(name), text.encode()):
            digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def is_current(prefix: str, source: str, tokenizer_spec: str, force: bool) -> bool:
    """Whether the output is already there.

    Raises:
        ValueError: something else is there and --force was not given.
    """
    if force or not os.path.exists(f"{prefix}.json"):
        return False
    try:
        info = IndexedDocuments(prefix).info
        assert info, "its .json stands"
        if info.source != source or info.tokenizer_fingerprint != load_tokenizer(tokenizer_spec).fingerprint:
            raise ValueError(f"{prefix} holds data of other texts or options")
    except ValueError as error:
        raise ValueError(f"{error}; --force replaces it, --output writes elsewhere") from None
    return True


def prepare_tokenizer(documents: list[tuple[str, str]], path: str, options: argparse.Namespace) -> Tokenizer:
    """The byte tokenizer, or a BPE trained on the documents of the training split and saved at `path`."""
    if options.tokenizer == "byte":
        return ByteTokenizer()
    print(f"training a BPE of {options.vocab_size} tokens on the training split", file=sys.stderr)
    held_in = split_documents(len(documents), options.valid_fraction)["train"]
    train = DocumentOrder(len(documents), options.seed, *held_in)
    return train_bpe((documents[i][1] for i in sorted(train(0, len(train)))), options.vocab_size, path)


def write(documents: list[tuple[str, str]], prefix: str, tokenizer: Tokenizer, source: str) -> None:
    """Write the documents, with a progress line on a terminal."""
    with IndexedWriter(prefix, tokenizer, source) as writer:
        for number, (name, text) in enumerate(documents, start=1):
            writer.add(name, tokenizer.encode(text), len(text.encode()))
            if sys.stderr.isatty() and (number % 20 == 0 or number == len(documents)):
                end = "\n" if number == len(documents) else ""
                print(f"\r{number}/{len(documents)} documents", end=end, file=sys.stderr, flush=True)


def parse(arguments: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Tokenise the .py files of the running Python's standard library into PREFIX.bin, .idx, "
        ".inputs and .json, for bpe with tokenizer.json beside them. Test packages are left out. Current "
        "output is kept.",
    )
    add = parser.add_argument
    stdlib = Path(sysconfig.get_path("stdlib"))
    add(
        "--source",
        type=Path,
        default=stdlib,
        metavar="FOLDER",
        help="default: %(default)s",
    )
    add("--output", metavar="PREFIX", help=f"default: {OUTPUT}/byte or {OUTPUT}/bpe_VOCAB/tokens")
    add(
        "--tokenizer",
        choices=("byte", "bpe"),
        default="byte",
        help="default: %(default)s",
    )
    add("--vocab-size", type=int, default=4096, help="bpe only: tokens (default: %(default)s)")
    text = "bpe only: the training run's, so that the BPE never sees validation text (default: %(default)s)"
    add("--valid-fraction", type=float, default=DataConfig.valid_fraction, help=text)
    add("--seed", type=int, default=TrainerConfig.seed, help=text)
    add("--force", action="store_true", help="replace output that is there")
    return parser, parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Prepare the corpus that the command line describes and print a summary."""
    parser, options = parse(arguments)
    started = time.perf_counter()
    default = "byte" if options.tokenizer == "byte" else f"bpe_{options.vocab_size}/tokens"
    prefix = options.output or f"{OUTPUT}/{default}"
    spec = "byte" if options.tokenizer == "byte" else str(Path(prefix).with_name("tokenizer.json"))
    try:
        documents, skipped = collect(options.source)
        source = fingerprint(documents, options)
        kept = is_current(prefix, source, spec, options.force)
        if not kept:
            write(documents, prefix, prepare_tokenizer(documents, spec, options), source)
        info = read_info(prefix)
    except ValueError as error:
        parser.error(str(error))
    print(f"{'kept' if kept else 'wrote'} {prefix} in {time.perf_counter() - started:.1f} s")
    print(
        f"{info.documents} documents, {info.bytes} bytes, {info.tokens} tokens, "
        f"{info.bytes / info.tokens:.3f} bytes per token, vocab_size {info.vocab_size}"
    )
    print("skipped: " + (", ".join(f"{count} {why}" for why, count in sorted(skipped.items())) or "none"))
    print(f"use: data.path={prefix} data.tokenizer={spec} model.vocab_size={info.vocab_size}")


if __name__ == "__main__":
    main()
