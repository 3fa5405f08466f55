"""What a checkpoint of ours keeps of the Hugging Face checkpoint that it came from, in its folder `hf/`.

An export takes from there whatever training does not change.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatsp.checkpoint.manifest import FIX, Damaged, read_manifest
from megatsp.data.tokenizer import huggingface
from megatsp.hf.checkpoint import HFCheckpoint, read_json
from megatsp.hf.safetensors_file import SHORT

FOLDER = "hf"
TYPES = "dtypes.json"
_CONFIGS = ("config.json", "generation_config.json")
# Files of tokenizers beside those that checkpoints store in `tokenizer/`.
_TOKENIZER = ("tokenizer.model", "added_tokens.json", "vocab.json", "merges.txt")


@dataclass(frozen=True)
class Kept:
    """config: of the source's config.json; None if there was no source. files: its other files by name.

    dtype: of most of its weights, "" without a source; exceptions: of the others, by tensor.
    """

    config: dict[str, Any] | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)
    dtype: str = ""
    exceptions: Mapping[str, str] = field(default_factory=dict)


def kept_files(checkpoint: HFCheckpoint) -> dict[str, bytes]:
    """The files to save with a checkpoint of ours, by their paths in its folder."""
    beside = () if (checkpoint.folder / "tokenizer.json").is_file() else huggingface.FILES
    names = [name for name in (*_CONFIGS, *_TOKENIZER, *beside) if (checkpoint.folder / name).is_file()]
    spelt = {name: SHORT[kind] for name, kind in checkpoint.dtypes.items() if kind in SHORT}
    others = {name: kind for name, kind in spelt.items() if kind != checkpoint.dtype}
    types = json.dumps({"dtype": checkpoint.dtype, "exceptions": others}, indent=2) + "\n"
    files = {f"{FOLDER}/{name}": (checkpoint.folder / name).read_bytes() for name in names}
    return {**files, f"{FOLDER}/{TYPES}": types.encode()}


def stored_files(folder: Path) -> dict[str, bytes]:
    """What a checkpoint of ours has of them, by their paths in its folder: the next ones keep it too.

    Raises:
        ValueError: its manifest cannot be used, or a file cannot be read.
    """
    names = [name for name in sorted(read_manifest(folder).files) if name.startswith(f"{FOLDER}/")]
    try:
        return {name: (folder / name).read_bytes() for name in names}
    except OSError as error:
        raise Damaged(
            f"{folder} is damaged: cannot read {error.filename}: {error.strerror}; {FIX}"
        ) from error


def read_kept(folder: Path) -> Kept:
    """Of a checkpoint of ours; empty if it came from nowhere.

    Raises:
        ValueError: a file is damaged.
    """
    kept = folder / FOLDER
    stored = {name.removeprefix(f"{FOLDER}/"): content for name, content in stored_files(folder).items()}
    if not stored:
        return Kept()
    types = read_json(kept / TYPES)
    files = {name: content for name, content in stored.items() if name not in (TYPES, _CONFIGS[0])}
    if types.get("dtype") not in SHORT.values() or not isinstance(types.get("exceptions"), dict):
        raise ValueError(f"{kept / TYPES} is damaged: it names no type of weights; restore the checkpoint")
    return Kept(read_json(kept / _CONFIGS[0]), files, types["dtype"], types["exceptions"])
