"""Long documents from code repositories and books: files of a repository are joined, short ones left out.

See README.md beside this file.
"""

import argparse
import filecmp
import json
import subprocess
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

from megatsp.data.preprocess.inputs import TEXT, find, kind_of
from megatsp.data.preprocess.sources import Bad, Piece, Position, message, num_row_groups, records

OUTPUT = "outputs/data/prolong"
TOKENIZER = "outputs/data/fineweb_edu/tokenizer"
MIN_BYTES, MAX_BYTES = 1 << 18, 1 << 22  # about 64K tokens; what megatsp preprocess takes
MAX_FILE_BYTES = 1 << 26
BUCKETS = 256

Document = tuple[str, str, str]  # repository or "", path, text


def read_folder(given: str, max_bytes: int, skipped: Counter[str]) -> Iterator[Document]:
    """Files in order of path. Each folder in `given` is a repository; a file beside them is a book.

    Raises:
        ValueError: no such folder, or a file beside the repositories that holds records.
    """
    for file in find([given], TEXT):
        path = Path(file.path).relative_to(given)
        is_book = len(path.parts) == 1
        if is_book and kind_of(file.path) != TEXT:
            raise ValueError(
                f"--source {given} holds {path}: name files of records themselves, not their folder"
            )
        if file.bytes > max_bytes:
            skipped["files above --max-bytes"] += 1
            continue
        try:
            text = Path(file.path).read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            skipped["files that are not UTF-8"] += 1
        else:
            yield "" if is_book else str(Path(given, path.parts[0])), path.as_posix(), text


def read_records(path: str, options: argparse.Namespace) -> Iterator[Document]:
    """The records of a JSONL or Parquet file; those without a repository are books.

    Raises:
        ValueError: a record that cannot be read, or that has no text.
    """
    kind, num_bytes = kind_of(path), Path(path).stat().st_size
    end = num_row_groups(path) if kind == "parquet" else num_bytes
    piece = Piece(kind, path, 0, end, num_bytes)
    keys = (options.text_key, options.repo_key, options.path_key)
    for number, content in records(piece, keys, MAX_FILE_BYTES, Position(), need_all=False):
        if isinstance(content, Bad):
            raise ValueError(message(piece, number, content))
        assert isinstance(content, dict), "a record"
        text = content.get(options.text_key)
        if not isinstance(text, str):
            bad = Bad(f"no text under {options.text_key}", f"the record has {', '.join(content)}")
            raise ValueError(message(piece, number, bad))
        name = content.get(options.path_key)
        yield str(content.get(options.repo_key) or ""), str(name or f"{number:012}"), text


def read(options: argparse.Namespace, skipped: Counter[str]) -> Iterator[Document]:
    """All files of --source, which are folders of repositories and books, and files of records.

    Raises:
        ValueError: nothing there, or a file that can be neither.
    """
    for given in options.source:
        if Path(given).is_dir():
            yield from read_folder(given, options.max_bytes, skipped)
            continue
        for file in find([given]):
            if file.kind == TEXT:
                raise ValueError(f"--source {file.path}: give .jsonl or .parquet files, or a folder")
            yield from read_records(file.path, options)


def join(
    repo: str, files: Iterable[tuple[str, str]], options: argparse.Namespace, counts: Counter[str]
) -> Any:
    """The documents of a repository: its files one after the other, cut between files at --max-bytes.

    Yields:
        records of long.jsonl.
    """
    texts: list[str] = []
    size = 0

    def finished() -> Iterator[dict[str, Any]]:
        if size >= options.min_bytes:
            yield {"text": "\n".join(texts), "repo": repo, "files": len(texts)}
        elif texts:
            counts["documents below --min-bytes"] += 1

    for _, text in files:
        num_bytes = len(text.encode("utf-8", "surrogatepass")) + 1
        if num_bytes > options.max_bytes:
            counts["files above --max-bytes"] += 1
            continue
        if size + num_bytes > options.max_bytes:
            yield from finished()
            texts, size = [], 0
        texts.append(text)
        size += num_bytes
    yield from finished()


def group(documents: Iterable[Document], folder: Path) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Books as they come, then the repositories with their files in order of path.

    Files of repositories go to buckets in `folder` first, by a hash of the repository's name, since those of
    one may be far apart: memory is that of a bucket.
    """
    with ExitStack() as opened:
        buckets: dict[int, TextIO] = {}
        for repo, name, text in documents:
            if not repo:
                yield "", [(name, text)]
                continue
            bucket = zlib.crc32(repo.encode("utf-8", "surrogatepass")) % BUCKETS
            if bucket not in buckets:
                buckets[bucket] = opened.enter_context(open(folder / str(bucket), "w", encoding="utf-8"))
            buckets[bucket].write(json.dumps([repo, name, text]) + "\n")
    for bucket in sorted(buckets):
        repositories: dict[str, list[tuple[str, str]]] = {}
        with open(folder / str(bucket), encoding="utf-8") as lines:
            for repo, name, text in map(json.loads, lines):
                repositories.setdefault(repo, []).append((name, text))
        for repo, files in sorted(repositories.items()):
            yield repo, sorted(files)


def write(options: argparse.Namespace, path: Path) -> tuple[int, Counter[str]]:
    """Write the long documents; returns how many, and what was left out.

    Raises:
        ValueError: bad input, or nothing to write.
    """
    skipped = Counter[str]()
    written = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with (
            tempfile.TemporaryDirectory(dir=path.parent, prefix="buckets_") as folder,
            temporary.open("w", encoding="utf-8") as file,
        ):
            for repo, files in group(read(options, skipped), Path(folder)):
                for document in join(repo, files, options, skipped):
                    file.write(json.dumps(document) + "\n")
                    written += 1
        if not written:
            left = ", ".join(f"{count} {why}" for why, count in skipped.items())
            raise ValueError(
                f"no document of at least --min-bytes {options.min_bytes} ({left or 'no files'})"
            )
        if not (path.exists() and filecmp.cmp(path, temporary, shallow=False)):
            temporary.replace(
                path
            )  # else megatsp preprocess goes on with the file, which it knows by its time
    finally:
        temporary.unlink(missing_ok=True)
    return written, skipped


def parse(arguments: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Joins the files of each repository to long documents, keeps those and the books that "
        "are long enough in OUTPUT/long.jsonl, and tokenises them to OUTPUT/long_text_document.",
        epilog="Further options go to megatsp preprocess: --workers 16",
        allow_abbrev=False,
    )
    add = parser.add_argument
    text = "a folder whose folders are repositories and whose files are books; or .jsonl and .parquet files"
    add("--source", nargs="+", required=True, metavar="PATH", help=text)
    add("--output", type=Path, default=OUTPUT, metavar="FOLDER", help="default: %(default)s")
    add(
        "--tokenizer",
        default=TOKENIZER,
        metavar="SPEC",
        help="that of the short texts (default: %(default)s)",
    )
    text = "shorter documents are left out (default: %(default)s)"
    add("--min-bytes", type=int, default=MIN_BYTES, metavar="N", help=text)
    text = "longer repositories are cut between files, longer files left out (default: %(default)s)"
    add("--max-bytes", type=int, default=MAX_BYTES, metavar="N", help=text)
    text = "key of a file's text in a record (default: %(default)s)"
    add("--text-key", default="text", metavar="KEY", help=text)
    text = "key of its repository; a record without one is a book (default: %(default)s)"
    add("--repo-key", default="repo", metavar="KEY", help=text)
    text = "key of its path, which decides the order in the repository (default: %(default)s)"
    add("--path-key", default="path", metavar="KEY", help=text)
    options, rest = parser.parse_known_args(arguments)
    options.preprocess = rest
    if not 1 <= options.min_bytes <= options.max_bytes:
        parser.error(f"--min-bytes {options.min_bytes}: must be from 1 to --max-bytes {options.max_bytes}")
    return parser, options


def main(arguments: list[str] | None = None) -> int:
    """Prepare the corpus that the command line describes; returns the exit status."""
    parser, options = parse(arguments)
    path = options.output / "long.jsonl"
    try:
        written, skipped = write(options, path)
    except ValueError as error:
        parser.error(str(error))
    left = ", ".join(f"{count} {why}" for why, count in sorted(skipped.items()))
    print(f"wrote {path}: {written} documents; left out: {left or 'nothing'}", flush=True)
    command = [sys.executable, "-m", "megatsp", "preprocess", "--input", str(path), "--append-eod"]
    command += ["--tokenizer", options.tokenizer, "--output-prefix", str(options.output / "long")]
    command += ["--max-document-bytes", str(options.max_bytes), *options.preprocess]
    return subprocess.run(command).returncode


if __name__ == "__main__":
    sys.exit(main())
