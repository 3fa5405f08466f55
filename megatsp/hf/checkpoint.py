"""Opens a Hugging Face checkpoint: everything that can be found wrong with it is, before a weight is used."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatsp.data.tokenizer import load_tokenizer
from megatsp.hf.families import is_superfluous, to_model
from megatsp.hf.first_rank import on_first_rank
from megatsp.hf.hashes import check_hashes, expected_hashes
from megatsp.hf.hub import INDEX, folder_of
from megatsp.hf.safetensors_file import DTYPES, SHORT, Entry, TensorFile, read_header
from megatsp.model.gpt import GPT
from megatsp.schema import ModelConfig

SINGLE = "model.safetensors"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
_SHOWN = 8  # of a list of tensors
_PAGE, _PAGES = 4096, 64  # of each file: what the fingerprint reads


@dataclass(frozen=True)
class HFCheckpoint:
    """A checkpoint whose parts were found to fit together; `load_weights` reads it.

    folder: where it is; of a hub's name, in its cache. model, config: of its config.json. dtype: fp32, bf16
    or fp16, of most of its weights. fingerprint: hex, of its weights' names, shapes and types, and of a part
    of their bytes. files: of weights. dtypes: by tensor, as safetensors spells them.
    """

    folder: Path
    model: ModelConfig
    config: dict[str, Any]
    dtype: str
    fingerprint: str
    files: tuple[Path, ...] = ()
    dtypes: Mapping[str, str] = field(default_factory=dict)

    @property
    def has_tokenizer(self) -> bool:
        return any((self.folder / name).is_file() for name in TOKENIZER_FILES)


def open_checkpoint(name: str, hashes: bool = True) -> HFCheckpoint:
    """The checkpoint in a folder or of a hub's name, once found whole; on all ranks, or in one process.

    hashes: also reads the files through, on one rank, where their SHA-256 is known.

    Raises:
        ValueError: nothing there; an architecture, option or type of weights that we do not compute; a file
            or tensor that is missing, damaged, superfluous or of another shape; a tokenizer that the
            embedding is too small for.
    """
    folder = folder_of(name)
    config = _read_config(folder, name)
    try:
        model = to_model(config)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    except (AttributeError, KeyError, TypeError) as error:  # a value of a kind that the key never has
        raise ValueError(f"{name}: config.json is damaged: {type(error).__name__}: {error}") from error
    headers = _read_headers(folder, name)
    _check_tensors(name, model, headers)
    dtypes = {tensor: entry.dtype for entries in headers.values() for tensor, entry in entries.items()}
    checkpoint = HFCheckpoint(
        folder, model, config, _most(headers), _fingerprint(headers), tuple(headers), dtypes
    )
    on_first_rank(lambda: _check_content(checkpoint, name, hashes))
    return checkpoint


def check_fingerprint(checkpoint: HFCheckpoint, name: str, tuned: str) -> None:
    """Checks that a checkpoint is the one of this fingerprint, which a run tunes.

    Raises:
        ValueError: it is not: what was learnt would be added to other weights.
    """
    if tuned != checkpoint.fingerprint:
        raise ValueError(
            f"{name} is not what the run tunes: its fingerprint is {checkpoint.fingerprint[:12]}, the run's "
            f"{tuned[:12] or 'none'}. Give the checkpoint that it began with, or choose another name="
        )


def expected_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the model's parameters by name, in the order of the network."""
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in GPT(model).named_parameters()}


def _read_config(folder: Path, name: str) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        if (folder / "adapter_config.json").is_file():
            raise ValueError(f"{name} is an adapter of another model (adapter_config.json): give its base")
        found = ", ".join(sorted(file.name for file in folder.iterdir())[:_SHOWN]) or "nothing"
        raise ValueError(f"{name} has no config.json, so it is no Hugging Face checkpoint; it holds {found}")
    return read_json(path)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object, but a {type(content).__name__}")
    return content


def _read_headers(folder: Path, name: str) -> dict[Path, dict[str, Entry]]:
    """The tensors of every file of weights.

    Raises:
        ValueError: a file is missing or damaged, or the index says something else than the files.
    """
    single, index = (folder / file for file in (SINGLE, INDEX))
    if single.is_file() and index.is_file():
        raise ValueError(f"{name} has {SINGLE} and {INDEX}: remove the one that is not meant")
    if single.is_file():
        return {single: read_header(single)[0]}
    if not index.is_file():
        raise ValueError(f"{name} has no {SINGLE}{_instead(folder)}")
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
        raise ValueError(f"{index} is damaged: it has no weight_map of names and files")
    files = sorted(set(where.values()))
    if outside := [file for file in files if Path(file).name != file]:
        raise ValueError(f"{index} is damaged: {outside[0]!r} is not the name of a file beside it")
    if missing := [file for file in files if not (folder / file).is_file()]:
        raise ValueError(
            f"{name}: {len(missing)} of {len(files)} files of weights are missing: {shown(missing)}; "
            "download them too"
        )
    headers = {folder / file: read_header(folder / file)[0] for file in files}
    held = {tensor: path.name for path, entries in headers.items() for tensor in entries}
    wrong = [tensor for tensor in {**where, **held} if where.get(tensor) != held.get(tensor)]
    if wrong or sum(map(len, headers.values())) != len(held):
        first = sorted(wrong)[0] if wrong else "a tensor that two files hold"
        raise ValueError(
            f"{index} and the files do not fit together: {len(wrong)} tensors are not where it says, such as "
            f"{first}: {where.get(first, 'not')} in the index, {held.get(first, 'not')} in the files"
        )
    return headers


def _instead(folder: Path) -> str:
    """What to do where there are no safetensors."""
    names = sorted(path.name for path in folder.iterdir())
    pickled = [file for file in names if file.endswith((".bin", ".pt", ".pth"))]
    if pickled:
        return (
            f", but {pickled[0]}: pickled weights can run code and are not read. Convert them where you "
            'trust them: python -c "from transformers import AutoModelForCausalLM as A; A.from_pretrained('
            f"'{folder}', dtype='auto').save_pretrained('NEW_FOLDER')\", and copy the tokenizer's files"
        )
    return f": give a folder of a Hugging Face model; it holds {', '.join(names[:_SHOWN]) or 'nothing'}"


def _check_tensors(name: str, model: ModelConfig, headers: Mapping[Path, Mapping[str, Entry]]) -> None:
    """Holds names, shapes and types against the model.

    Raises:
        ValueError: lists what is missing, unexpected, of another shape or of another type.
    """
    found = {tensor: entry for entries in headers.values() for tensor, entry in entries.items()}
    wanted = expected_shapes(model)
    problems = {
        "missing": [tensor for tensor in wanted if tensor not in found],
        "unexpected": [t for t in found if t not in wanted and not is_superfluous(t, model)],
        "of another shape": [
            f"{tensor} {found[tensor].shape} instead of {shape}"
            for tensor, shape in wanted.items()
            if tensor in found and found[tensor].shape != shape
        ],
        f"of a type other than {', '.join(SHORT.values())} (quantised weights are not read)": [
            f"{tensor} {found[tensor].dtype}"
            for tensor in wanted
            if tensor in found and found[tensor].dtype not in DTYPES
        ],
    }
    told = [f"{len(those)} {kind}: {shown(those)}" for kind, those in problems.items() if those]
    if told:
        raise ValueError(f"{name}: its tensors are not those of its config.json: {'; '.join(told)}")


def shown(names: Iterable[str]) -> str:
    """The first of a list of names, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more


def _most(headers: Mapping[Path, Mapping[str, Entry]]) -> str:
    """The type that most bytes are of."""
    sizes: dict[str, int] = {}
    for entry in (entry for entries in headers.values() for entry in entries.values()):
        sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.stop - entry.start
    return SHORT[max((kind for kind in sizes if kind in SHORT), key=lambda kind: sizes[kind])]


def _fingerprint(headers: Mapping[Path, Mapping[str, Entry]]) -> str:
    """Of every tensor's name, shape and type and of pages spread over every file."""
    digest = hashlib.sha256()
    for path, entries in headers.items():
        layout = {name: (entry.dtype, entry.shape, entry.start) for name, entry in entries.items()}
        digest.update(json.dumps(layout, sort_keys=True).encode())
        size = path.stat().st_size
        with path.open("rb") as file:
            for i in range(_PAGES):
                file.seek(max(0, size - _PAGE) * i // (_PAGES - 1))
                digest.update(file.read(_PAGE))
    return digest.hexdigest()


def _check_content(checkpoint: HFCheckpoint, name: str, hashes: bool) -> None:
    """What needs more than headers: hashes, a head that is said to be the embedding, the tokenizer."""
    if (generation := checkpoint.folder / "generation_config.json").is_file():
        read_json(generation)
    if hashes:
        check_hashes(expected_hashes(checkpoint.folder, checkpoint.files))
    model, head, embedding = checkpoint.model, "lm_head.weight", "model.embed_tokens.weight"
    if head in checkpoint.dtypes and not model.untie_embeddings_and_output_weights:
        pairs = zip(_blocks(checkpoint, head), _blocks(checkpoint, embedding), strict=True)
        if not all(torch.equal(one, other) for one, other in pairs):
            raise ValueError(
                f"{name}: config.json says tie_word_embeddings, but {head} is not {embedding}: set it to "
                "false, or remove the one that is not meant"
            )
    if not checkpoint.has_tokenizer:
        return
    size = load_tokenizer(str(checkpoint.folder)).vocab_size
    if size > model.vocab_size:
        raise ValueError(
            f"{name}: its tokenizer has {size} ids, but its embedding {model.vocab_size} rows: they are not "
            "of one model; copy the model's own tokenizer there"
        )


def _blocks(checkpoint: HFCheckpoint, tensor: str, rows: int = 4096) -> Iterator[torch.Tensor]:
    """A matrix, some rows at a time."""
    for path in checkpoint.files:
        if tensor in (file := TensorFile(path)).entries:
            yield from file.view(tensor).split(rows)
