"""Finds out which tokenizer a name stands for, by looking."""

import re
from pathlib import Path

from megatsp.data.tokenizer import huggingface, sentencepiece, tiktoken
from megatsp.data.tokenizer.base import MANIFEST, Tokenizer, read_json
from megatsp.data.tokenizer.byte import ByteTokenizer
from megatsp.data.tokenizer.huggingface import HuggingFaceTokenizer, files_of_vocabulary
from megatsp.data.tokenizer.sentencepiece import SentencePieceTokenizer
from megatsp.data.tokenizer.tiktoken import TiktokenTokenizer
from megatsp.nearest import did_you_mean

ALLOWED = (
    "'byte', a tokenizer.json, *.model or *.tiktoken file, a folder that holds one, a Hugging Face name such "
    "as OWNER/NAME, tiktoken:NAME, or gpt2-bpe:VOCAB.json,MERGES.txt"
)
BESIDE = ("tokenizer_config.json", "chat_template.jinja")
_CONVERT = (
    'To make a tokenizer.json of it: python -c "from transformers import AutoTokenizer as A; '
    "A.from_pretrained('{0}').save_pretrained('{1}')\""
)
# Files of tokenizers that only transformers' slow classes read.
_SLOW = ("vocab.json", "merges.txt", "vocab.txt", "tokenizer_config.json", "spiece.vocab", "tokenizer.pkl")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_FILE_NAME = re.compile(r".*\.(json|model|tiktoken|txt|jinja)")
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\s*(\n|$)")


def load_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer that `spec` names.

    Args:
        spec: "byte"; a file, told apart by its content: a tokenizer.json, a SentencePiece model, tiktoken's
            ranks; a folder that holds one of these, looked for in this order; "tiktoken:NAME";
            "gpt2-bpe:VOCAB,MERGES", two files; or, where no such path exists, a repository of the Hugging
            Face hub, from its cache or the network. What else a tokenizer.json needs (eos_token, chat
            template) is read beside it.

    Raises:
        ValueError: nothing there, or nothing that can be read.
    """
    if spec == "byte":
        return ByteTokenizer()
    kind, _, rest = spec.partition(":")
    if kind == "tiktoken":
        return tiktoken.named(rest)
    if kind == "gpt2-bpe":
        return _from_vocabulary(rest, spec)
    path = Path(spec).expanduser()
    if path.is_dir():
        return _from_folder(path, spec)
    if path.exists():
        return _from_file(path, spec)
    if kind in ("hf", "huggingface", "sentencepiece", "file"):
        raise ValueError(f"no tokenizer at {spec}: give the name or the path without {kind}: before it")
    near = did_you_mean(f"{kind}:", ("tiktoken:", "gpt2-bpe:")) if rest else did_you_mean(spec, ("byte",))
    if near or _FILE_NAME.fullmatch(spec) or not _HUB_NAME.fullmatch(spec):
        if not near and path.parent.is_dir():
            near = did_you_mean(path.name, (other.name for other in path.parent.iterdir()))
        raise ValueError(f"no tokenizer at {spec}{near}; give {ALLOWED}")
    return _from_hub(spec)


def _from_file(path: Path, spec: str) -> Tokenizer:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {spec}: {error.strerror}") from None
    if content.lstrip()[:1] == b"{" or path.suffix == ".json":
        if path.name == "vocab.json":
            raise ValueError(
                f"{spec} is a vocabulary without its merges: give gpt2-bpe:{spec},MERGES.txt, or a "
                "tokenizer.json"
            )
        beside = _read(path.parent, huggingface.FILES) if path.name == "tokenizer.json" else {}
        return HuggingFaceTokenizer(beside | {"tokenizer.json": content}, spec)
    if _TIKTOKEN_LINE.match(content):
        return TiktokenTokenizer(
            tiktoken.read_ranks(content, spec), spec, extra_files=_read(path.parent, BESIDE)
        )
    if content.startswith(b"\n"):  # of a ModelProto: field 1, the first piece
        return SentencePieceTokenizer(_read(path.parent, BESIDE) | {sentencepiece.MODEL: content}, spec)
    raise ValueError(
        f"{spec} is neither a tokenizer.json nor a SentencePiece model nor a tiktoken file: it begins with "
        f"{content[:16]!r}"
    )


def _from_folder(path: Path, spec: str) -> Tokenizer:
    names = {file.name for file in path.iterdir()}
    if MANIFEST in names:
        return _from_manifest(path, spec)
    if "tokenizer.json" in names:
        return HuggingFaceTokenizer(_read(path, huggingface.FILES), spec)
    models = sorted(name for name in names if name.endswith((".model", ".tiktoken")))
    if sentencepiece.MODEL in models:
        models = [sentencepiece.MODEL]
    if len(models) == 1:
        return _from_file(path / models[0], str(path / models[0]))
    if models:
        raise ValueError(f"{spec} holds several tokenizers: give the path of one of {', '.join(models)}")
    slow = [name for name in _SLOW if name in names]
    if slow:
        both = "vocab.json" in slow and "merges.txt" in slow
        either = f" Or, if it is GPT-2's kind: gpt2-bpe:{spec}/vocab.json,{spec}/merges.txt" if both else ""
        raise ValueError(
            f"{spec} has {', '.join(slow)} but no tokenizer.json: it is not a fast tokenizer. "
            f"{_CONVERT.format(spec, spec)}.{either}"
        )
    raise ValueError(
        f"no tokenizer at {spec}: it holds no tokenizer.json, *.model or *.tiktoken file, but "
        f"{', '.join(sorted(names)[:8]) or 'nothing'}"
    )


def _from_manifest(path: Path, spec: str) -> Tokenizer:
    """What files() of a tokenizer of bytes or of tiktoken were written to."""
    files = _read(path, (MANIFEST, tiktoken.RANKS, *BESIDE))
    manifest = read_json(files, MANIFEST, spec)
    if manifest.get("type") == "byte":
        return ByteTokenizer()
    try:
        if manifest["type"] != "tiktoken":
            raise KeyError("type")
        return TiktokenTokenizer(
            tiktoken.read_ranks(files[tiktoken.RANKS], spec),
            spec,
            manifest["pattern"],
            manifest["special_tokens"],
            {name: files[name] for name in BESIDE if name in files},
        )
    except KeyError as error:
        raise ValueError(
            f"{path / MANIFEST} is damaged: {error} is missing or wrong; restore the folder"
        ) from None


def _from_vocabulary(paths: str, spec: str) -> Tokenizer:
    vocab, comma, merges = paths.partition(",")
    if not comma:
        raise ValueError(f"{spec}: give two files, gpt2-bpe:VOCAB.json,MERGES.txt")
    try:
        contents = [Path(path).expanduser().read_bytes() for path in (vocab, merges)]
    except OSError as error:
        raise ValueError(f"cannot read {error.filename} of {spec}: {error.strerror}") from None
    return HuggingFaceTokenizer(files_of_vocabulary(spec, *contents), spec)


def _from_hub(name: str) -> Tokenizer:
    """A repository's tokenizer, by the Hugging Face library's cache; only the named files are fetched."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=list(huggingface.FILES)))
    except Exception as error:  # of many kinds: no network, no such repository, not allowed, no such name
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"no tokenizer at {name}: no such file or folder, and the Hugging Face hub did not give it "
            f"({type(error).__name__}: {reason}); give {ALLOWED}"
        ) from None
    files = _read(folder, huggingface.FILES)
    if "tokenizer.json" not in files:
        convert = _CONVERT.format(name, name.split("/")[-1])
        raise ValueError(
            f"the Hugging Face repository {name} has no tokenizer.json: it is not a fast tokenizer. "
            f"{convert}, and give that folder; or download its *.model or *.tiktoken file and give that"
        )
    return HuggingFaceTokenizer(files, name)


def _read(folder: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    """Those of the files that exist."""
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


def from_megatron(
    tokenizer_type: str,
    tokenizer_model: str | None = None,
    vocab_file: str | None = None,
    merge_file: str | None = None,
) -> str:
    """What load_tokenizer takes, of what Megatron's --tokenizer-type and the options beside it say.

    Raises:
        ValueError: an unknown type, or options that the type lacks or does not take.
    """
    by_model = (
        "HuggingFaceTokenizer",
        "PretrainedFromHF",
        "SentencePieceTokenizer",
        "GPTSentencePieceTokenizer",
        "Llama2Tokenizer",
        "TikTokenizer",
    )
    known = (*by_model, "GPT2BPETokenizer", "ByteLevelTokenizer")
    given = {"--tokenizer-model": tokenizer_model, "--vocab-file": vocab_file, "--merge-file": merge_file}
    if tokenizer_type == "NullTokenizer":
        raise ValueError(
            "--tokenizer-type NullTokenizer reads numbers, not text, and has no vocabulary: there is nothing "
            "to train on; for a test without files take ByteLevelTokenizer"
        )
    if tokenizer_type not in known:
        raise ValueError(
            f"unknown --tokenizer-type {tokenizer_type}{did_you_mean(tokenizer_type, known)} (known: "
            f"{', '.join(known)})"
        )
    wanted: tuple[str, ...] = ("--tokenizer-model",) if tokenizer_type in by_model else ()
    if tokenizer_type == "GPT2BPETokenizer":
        wanted = ("--vocab-file", "--merge-file")
    for option, value in given.items():
        if option in wanted and not value:
            raise ValueError(f"--tokenizer-type {tokenizer_type} needs {option}")
        if value and option not in wanted:
            raise ValueError(f"--tokenizer-type {tokenizer_type} does not take {option}")
    if tokenizer_type == "ByteLevelTokenizer":
        return "byte"
    if tokenizer_type == "GPT2BPETokenizer":
        return f"gpt2-bpe:{vocab_file},{merge_file}"
    assert tokenizer_model
    is_file = Path(tokenizer_model).expanduser().is_file()
    if tokenizer_type == "TikTokenizer":
        if tokenizer_model.endswith(".json"):
            raise ValueError(
                f"--tokenizer-type TikTokenizer: {tokenizer_model} is Megatron's own JSON of ranks, which is "
                "not read: give the model's tokenizer.json with HuggingFaceTokenizer, or a *.tiktoken file"
            )
        return tokenizer_model if is_file else f"tiktoken:{tokenizer_model}"
    if "HuggingFace" in tokenizer_type or "HF" in tokenizer_type or is_file:
        return tokenizer_model
    raise ValueError(
        f"--tokenizer-type {tokenizer_type}: --tokenizer-model {tokenizer_model} is no *.model file"
    )
