"""`megatsp convert export`: one of our checkpoints, of any mesh, becomes a folder that transformers loads."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatsp.checkpoint.manifest import check_files
from megatsp.checkpoint.paths import TOKENIZER
from megatsp.compose import from_yaml
from megatsp.data.tokenizer import load_tokenizer
from megatsp.data.tokenizer.base import MANIFEST as OUR_TOKENIZER
from megatsp.hf.checkpoint import SINGLE, open_checkpoint, read_json
from megatsp.hf.families import config_of
from megatsp.hf.hashes import MANIFEST, hashes
from megatsp.hf.hub import INDEX
from megatsp.hf.kept import Kept, read_kept
from megatsp.hf.output import MAX_SHARD_BYTES, cast, check_output, tensor_bytes, whole_folder, write_weights
from megatsp.hf.safetensors_file import DTYPES, SHORT
from megatsp.hf.source import CheckpointSource, HFSource, TensorSource
from megatsp.hf.verify import VERIFICATION, Report, verify_alone
from megatsp.schema import Config

LONG = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # as a config.json spells them
_HEADERS = {short: name for name, short in SHORT.items()}


def export(
    checkpoint_folder: Path,
    output: Path,
    dtype: str = "auto",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    verify: bool = True,
    force: bool = False,
) -> Report | None:
    """Writes the weights of a checkpoint (`checkpoints/iter_N`) of ours; in one process, from any mesh.

    It takes the memory of one tensor. dtype: fp32, bf16, fp16, or auto: as they were imported.
    force: replaces what is at `output`.

    Raises:
        ValueError: the checkpoint is damaged, holds adapters alone, or no family of transformers fits its
            model; `output` is there already or cannot be written; transformers' logits are not ours.
    """
    check_output(output, force, checkpoint_folder)
    check_files(checkpoint_folder)
    config = from_yaml((checkpoint_folder / "config.yaml").read_text())
    if config.finetune.lora_rank:
        raise ValueError(
            f"{checkpoint_folder} holds adapters alone: megatsp convert export writes them, or with --merge "
            "the weights that they make"
        )
    source = CheckpointSource(checkpoint_folder, config.model)
    return export_source(source, config, output, checkpoint_folder, dtype, max_shard_bytes, verify, force)


def export_source(
    source: TensorSource,
    config: Config,
    output: Path,
    beside: Path,
    dtype: str = "auto",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    verify: bool = True,
    force: bool = False,
) -> Report | None:
    """As `export`, of the weights of any source.

    beside: the checkpoint whose tokenizer and folder `hf/` go along.
    """
    kept = read_kept(beside)
    context = max(config.model.max_position_embeddings, config.trainer.seq_length)
    model = replace(config.model, max_position_embeddings=context)
    dtypes = _dtypes(source, dtype, kept)
    tokenizer = beside / TOKENIZER
    about = config_of(model, kept.config)
    eod = None
    if kept.config is None and tokenizer.is_dir():
        about["eos_token_id"] = eod = load_tokenizer(str(tokenizer)).eod
    most = SHORT[max(set(dtypes.values()), key=lambda kind: sum(d == kind for d in dtypes.values()))]
    about["torch_dtype" if "torch_dtype" in about else "dtype"] = LONG[most]
    num_bytes = sum(tensor_bytes(shape, dtypes[name]) for name, shape in source.shapes.items())
    with whole_folder(output, force, num_bytes) as folder:
        hashed = _write_weights(folder, source, dtypes, max_shard_bytes)
        _write_json(folder / "config.json", about)
        if "generation_config.json" in kept.files:
            (folder / "generation_config.json").write_bytes(kept.files["generation_config.json"])
        else:
            _write_json(folder / "generation_config.json", {"eos_token_id": eod} if eod is not None else {})
        for line in _write_tokenizer(folder, tokenizer, kept.files):
            print(line, flush=True)
        written = open_checkpoint(str(folder), hashes=False)
        report = None
        if verify:
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            rounded = Rounded(source, dtypes)
            report = verify_alone(rounded, model, HFSource(written), written.config, device)
            (folder / VERIFICATION).write_text(report.to_json())
        others = hashes(path for path in folder.iterdir() if path.name not in hashed)
        hashed |= {path.name: found for path, found in others.items()}
        lines = [f"{hashed[name]}  {name}\n" for name in sorted(hashed)]
        (folder / MANIFEST).write_text("".join(lines))
    return report


@dataclass(frozen=True)
class Rounded:
    """The tensors of a source as they are after their export; dtypes: as in the header."""

    source: TensorSource
    dtypes: Mapping[str, str]

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self.source.shapes

    def read(self, name: str) -> Tensor:
        return cast(self.source.read(name), self.dtypes[name], name)


def _dtypes(source: TensorSource, dtype: str, kept: Kept) -> dict[str, str]:
    """The type that each tensor is written in, as in the header. auto without a source: fp32."""
    if dtype not in ("auto", *_HEADERS):
        raise ValueError(f"dtype {dtype}: choose one of auto, {', '.join(_HEADERS)}")
    if dtype != "auto":
        return dict.fromkeys(source.shapes, _HEADERS[dtype])
    default = kept.dtype or "fp32"
    return {name: _HEADERS[kept.exceptions.get(name, default)] for name in source.shapes}


def _write_weights(
    folder: Path, source: TensorSource, dtypes: Mapping[str, str], max_shard_bytes: int
) -> dict[str, str]:
    """model.safetensors, or files of at most so many bytes and their index; returns the files' SHA-256."""

    def name_of(number: int, count: int) -> str:
        return SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"

    where, sums = write_weights(
        folder, source, dtypes, max_shard_bytes, name_of, {"format": "pt"}, hashlib.sha256
    )
    if len(set(where.values())) > 1:
        total = sum(tensor_bytes(source.shapes[name], dtypes[name]) for name in where)
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})
    return {name: digest for name, (_, digest) in sums.items()}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _write_tokenizer(folder: Path, tokenizer: Path, kept: Mapping[str, bytes]) -> list[str]:
    """The tokenizer's files, if transformers can read them; returns what there is to say."""
    if not tokenizer.is_dir() or (tokenizer / OUR_TOKENIZER).is_file():
        return [
            "no tokenizer's files were written: transformers has no tokenizer of this kind "
            f"({read_json(tokenizer / OUR_TOKENIZER).get('type')})"
            if tokenizer.is_dir()
            else "no tokenizer's files were written: the checkpoint has none"
        ]
    files = {path.name: path.read_bytes() for path in sorted(tokenizer.iterdir())}
    own = set(files)
    files |= {
        name: content for name, content in kept.items() if name not in {*files, "generation_config.json"}
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    settings = folder / "tokenizer_config.json"
    if settings.is_file() and "auto_map" in (values := read_json(settings)):
        _write_json(settings, {key: value for key, value in values.items() if key != "auto_map"})
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # of many kinds, by what a tokenizer's class stumbles over
        for name in files:
            (folder / name).unlink()
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        names = ", ".join(sorted(own))
        return [f"no tokenizer's files were written ({names}): transformers cannot read them: {reason}"]
    return []


assert set(LONG) == set(_HEADERS) == {SHORT[kind] for kind in DTYPES}
