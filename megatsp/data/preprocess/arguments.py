"""The arguments of `megatsp preprocess`, called as those of Megatron's tools/preprocess_data.py."""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

from megatsp.data.preprocess.inputs import TYPES
from megatsp.data.preprocess.sources import MAX_DOCUMENT_BYTES
from megatsp.nearest import did_you_mean
from megatsp.parser import Parser

DESCRIPTION = """\
Tokenises texts into PREFIX_KEY_document.bin and .idx, as Megatron's tools/preprocess_data.py does, and
conversations with who speaks each token. Documents are in the order of the inputs. An interrupted command
goes on where it was when it is given again. `megatsp preprocess train-tokenizer --help` makes a tokenizer.
"""
EPILOG = """\
examples:
  megatsp preprocess --input pages.jsonl.zst --output-prefix data/pages --tokenizer byte --append-eod
  megatsp preprocess --input books/ 'more/*.parquet' --output-prefix data/books --append-eod --workers 8 \\
      --tokenizer-type HuggingFaceTokenizer --tokenizer-model path/to/tokenizer --on-error skip
  megatsp preprocess --input chats.jsonl --format chat --output-prefix data/chats --tokenizer path/or/name
  megatsp preprocess --dataset path/or/name --dataset-split train --output-prefix data/set --tokenizer byte
"""
FORMATS = ("text", "chat", "prompt", "instruction")


@dataclass(frozen=True)
class Options:
    """What the command line asks for, checked."""

    input: tuple[str, ...]
    dataset: str | None
    dataset_config: str | None
    dataset_split: str
    input_type: str
    output_prefix: str
    json_keys: tuple[str, ...]
    format: str
    chat_template: str | None  # its text
    tokenizer: str | None
    tokenizer_type: str | None
    tokenizer_model: str | None
    vocab_file: str | None
    merge_file: str | None
    append_eod: bool
    workers: int
    partitions: int
    log_interval: float
    on_error: str
    max_document_bytes: int
    force: bool
    keep_partitions: bool

    @property
    def outputs(self) -> dict[str, str]:
        """Prefix of each output by its JSON key, or by the chat format."""
        names = self.json_keys if self.format == "text" else (self.format,)
        return {name: f"{self.output_prefix}_{name}_document" for name in names}


def run(arguments: list[str]) -> int:
    """Reads the arguments, preprocesses, and returns the exit status.

    Raises:
        ValueError: arguments that make no sense, bad input, or a full disk.
    """
    if arguments[:1] == ["train-tokenizer"]:
        from megatsp.data.tokenizer.train import main

        return int(main(arguments[1:]) or 0)
    options = parse(arguments)

    from megatsp.data.preprocess.run import preprocess

    return preprocess(options)


def parse(arguments: list[str]) -> Options:
    """The options of a command line.

    Raises:
        ValueError: unknown or contradicting ones.
    """
    parser = _parser()
    given, unknown = parser.parse_known_args(arguments)
    if unknown:
        flag = unknown[0].partition("=")[0]
        near = did_you_mean(flag, parser._option_string_actions)
        raise ValueError(f"unknown option {flag}{near} (megatsp preprocess --help lists them)")
    _check(given)
    values = vars(given)
    keys = tuple(values.pop("json_keys") or ("text",))
    template = given.chat_template and _read_template(given.chat_template)
    split = values.pop("dataset_split") or "train"
    values |= {"input": tuple(given.input or ()), "chat_template": template}
    return Options(json_keys=keys, dataset_split=split, **values)


def _parser() -> Parser:
    parser = Parser(
        "megatsp preprocess", DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument_group("input").add_argument
    text = "files, folders and globs: .jsonl, .jsonl.gz, .jsonl.zst, .parquet, or else a file is a document"
    add("--input", nargs="+", action="extend", metavar="PATH", help=text)
    add("--input-type", choices=("auto", *TYPES), default="auto", help="default: by each file's suffix")
    text = "a folder of save_to_disk, or what datasets.load_dataset takes; instead of --input"
    add("--dataset", metavar="NAME_OR_PATH", help=text)
    add("--dataset-config", metavar="NAME")
    add("--dataset-split", metavar="SPLIT", help="default: train")
    text = "of the records to tokenise, each to an output of its own (default: text)"
    add("--json-keys", nargs="+", metavar="KEY", help=text)
    add("--format", choices=FORMATS, default="text", help="what a record is (default: text)")
    add("--chat-template", metavar="FILE", help="a Jinja chat template (default: the tokenizer's own)")
    text = "what to do about a bad record or file: end with its place, or count it and go on (default: fail)"
    add("--on-error", choices=("fail", "skip"), default="fail", help=text)
    text = f"longer documents are bad: memory is in proportion (default: {MAX_DOCUMENT_BYTES})"
    add("--max-document-bytes", type=int, default=MAX_DOCUMENT_BYTES, metavar="N", help=text)

    add = parser.add_argument_group("tokenizer").add_argument
    text = "as data.tokenizer of training: byte, a file or folder, a name on the hub, tiktoken:NAME"
    add("--tokenizer", metavar="SPEC", help=text)
    add(
        "--tokenizer-type", metavar="TYPE", help="Megatron's, as HuggingFaceTokenizer; instead of --tokenizer"
    )
    add("--tokenizer-model", metavar="PATH", help="goes with --tokenizer-type")
    add("--vocab-file", metavar="PATH", help="goes with --tokenizer-type GPT2BPETokenizer")
    add("--merge-file", metavar="PATH", help="goes with --tokenizer-type GPT2BPETokenizer")
    add("--append-eod", action="store_true", help="end each document with the tokenizer's end-of-document id")

    add = parser.add_argument_group("output").add_argument
    text = "writes PREFIX_KEY_document.bin, .idx, .inputs and .json; meanwhile PREFIX.parts"
    add("--output-prefix", metavar="PREFIX", required=True, help=text)
    add("--force", action="store_true", help="replace what is there, finished partitions too; may be resumed")
    add("--keep-partitions", action="store_true", help="do not remove PREFIX.parts at the end")

    add = parser.add_argument_group("process").add_argument
    add("--workers", type=int, default=1, metavar="N", help="processes, one core each (default: 1)")
    add("--partitions", type=int, default=0, metavar="N", help="default: 0, about 128 MB each")
    text = "seconds between lines of progress where there is no terminal (default: 10)"
    add("--log-interval", type=float, default=10.0, metavar="S", help=text)
    return parser


def _check(given: argparse.Namespace) -> None:
    """Refuses numbers out of range, and options that others would leave without effect."""
    for name, lowest in {"workers": 1, "partitions": 0, "max_document_bytes": 1, "log_interval": 0}.items():
        if not lowest <= getattr(given, name) < float("inf"):
            raise ValueError(f"{_flag(name)} {getattr(given, name)}: must be at least {lowest}")
    if bool(given.input) == (given.dataset is not None):
        raise ValueError("give either --input or --dataset")
    if (given.tokenizer is None) == (given.tokenizer_type is None):
        raise ValueError("give either --tokenizer, as in --tokenizer byte, or Megatron's --tokenizer-type")
    chat = given.format != "text"
    _refuse(given, given.dataset is None, ("dataset_config", "dataset_split"), "goes with --dataset")
    _refuse(
        given,
        given.tokenizer_type is None,
        ("tokenizer_model", "vocab_file", "merge_file"),
        "goes with --tokenizer-type",
    )
    _refuse(
        given, given.dataset is not None and given.input_type != "auto", ("input_type",), "goes with --input"
    )
    _refuse(given, not chat, ("chat_template",), "goes with --format chat, prompt or instruction")
    _refuse(given, chat, ("json_keys",), f"does not go with --format {given.format}, whose keys are fixed")
    _refuse(
        given, chat, ("append_eod",), f"does not go with --format {given.format}: it says how a document ends"
    )
    keys = given.json_keys or []
    for key in keys:
        if not key or os.sep in key or "\0" in key or keys.count(key) > 1:
            raise ValueError(f"--json-keys {key!r}: keys must differ and name files: no {os.sep} in them")
    if not os.path.basename(given.output_prefix):
        raise ValueError(f"--output-prefix {given.output_prefix}: give the beginning of a file's name too")


def _refuse(given: argparse.Namespace, wrong: bool, names: tuple[str, ...], why: str) -> None:
    for name in names:
        if wrong and getattr(given, name) not in (None, False):
            raise ValueError(f"{_flag(name)} {why}")


def _read_template(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--chat-template {path}: {getattr(error, 'strerror', None) or error}") from None


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
