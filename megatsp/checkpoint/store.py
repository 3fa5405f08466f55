"""Saving and loading by torch's distributed checkpoint, as safetensors: nothing is ever unpickled.

    checkpoints/iter_0000100/           written under a temporary name, renamed when whole
        shard-*.safetensors             each rank's part of every tensor, with its place in the whole
        state.json                      iteration, consumed samples and tokens, tokenizer, W&B run id
        config.yaml                     what the run was started with
        tokenizer/                      the tokenizer's files
        hf/                             of a model from Hugging Face: its config.json and the like
    checkpoints/latest_checkpointed_iteration.txt
    checkpoints/best_checkpointed_iteration.txt     of fine-tuning: the lowest validation loss

Tensors are logical: weights under their Hugging Face names and `optimizer.<moment>.<name>`. Any
mesh loads what any other saved. Only what is trained is saved: of a run with adapters, these alone.
"""

import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from megatsp.checkpoint.paths import LATEST, TOKENIZER, folder_of, replace_text, sync
from megatsp.checkpoint.state import RunState
from megatsp.data.tokenizer import Tokenizer, load_tokenizer

_OTHER = f"restore it, or write the iteration of another checkpoint into {LATEST} beside it"


def save(
    checkpoints: Path,
    state: RunState,
    model: nn.Module,
    tensors: dict[str, Tensor],
    extra: Mapping[str, bytes],
    tokenizer: Tokenizer | None = None,
) -> Path:
    """Writes one checkpoint on all ranks and moves the pointer to it last.

    tensors: beside the model's own, under names that do not collide. extra: small files by relative path.
    tokenizer: the run's; its files go along, so that the checkpoint needs none of what it was read from.
    """
    folder = folder_of(checkpoints, state.iteration)
    temporary = folder.with_name(folder.name + ".tmp")
    is_first = dist.get_rank() == 0
    if is_first:
        for stale in checkpoints.glob("iter_*.tmp"):  # of a save that was cut off
            shutil.rmtree(stale)
        temporary.mkdir(parents=True)
    dist.barrier()
    with _expected_warnings():
        dcp.save(
            _all_tensors(model, tensors),
            storage_writer=HuggingFaceStorageWriter(str(temporary), save_distributed=True),
        )
    if is_first:
        for name, content in extra.items():
            (temporary / name).parent.mkdir(exist_ok=True)
            (temporary / name).write_bytes(content)
        if tokenizer is not None:
            (temporary / TOKENIZER).mkdir(exist_ok=True)
            for name, content in tokenizer.files().items():
                (temporary / TOKENIZER / name).write_bytes(content)
            state = replace(state, tokenizer=tokenizer.name, tokenizer_fingerprint=tokenizer.fingerprint)
        state = replace(state, files=_sizes(temporary))
        (temporary / "state.json").write_text(json.dumps(asdict(state), indent=2) + "\n")
        for path in temporary.rglob("*"):
            sync(path)
        sync(temporary)
        shutil.rmtree(folder, ignore_errors=True)  # a run that was resumed before this iteration
        temporary.rename(folder)
        replace_text(checkpoints / LATEST, f"{state.iteration}\n")
    dist.barrier()
    return folder


def load(folder: Path, model: nn.Module, tensors: dict[str, Tensor]) -> RunState:
    """Fills what the model trains and `tensors` in place, on all ranks, from any mesh's checkpoint.

    Of iteration 0 a checkpoint may have none of `tensors`: an imported one, which then keep their values.

    Raises:
        ValueError: the checkpoint lacks a file, or one has another size or cannot be read; it lacks a
            tensor, or has one of another shape.
    """
    state = read_state(folder)
    wanted = _all_tensors(model, tensors)
    reader = HuggingFaceStorageReader(str(folder))
    with _expected_warnings():
        try:
            found = reader.read_metadata().state_dict_metadata
        except SafetensorError as error:
            raise ValueError(f"{folder} is damaged: {error}; {_OTHER}") from error
        if state.iteration == 0 and not any(name in found for name in tensors):
            wanted = _all_tensors(model, {})
        shapes = {name: getattr(found.get(name), "size", None) for name in wanted}
        wrong = [
            f"{name}: wanted {tuple(tensor.shape)}, found {tuple(size) if size is not None else 'nothing'}"
            for name, tensor in wanted.items()
            if (size := shapes[name]) is None or tuple(size) != tuple(tensor.shape)
        ]
        if wrong:
            raise ValueError(
                f"{folder} does not fit this model; {len(wrong)} tensors differ: " + "; ".join(wrong[:8])
            )
        dcp.load(wanted, storage_reader=HuggingFaceStorageReader(str(folder)))
    return state


def read_state(folder: Path) -> RunState:
    """The checkpoint's state, once its files are found to be whole.

    Raises:
        ValueError: state.json cannot be read, or a file is missing or of another size.
    """
    try:
        state = RunState(**json.loads((folder / "state.json").read_text()))
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"{folder}/state.json is damaged: {error}; {_OTHER}") from error
    sizes = _sizes(folder)
    for name, size in state.files.items():
        if sizes.get(name) != size:
            found = f"has {sizes[name]} bytes" if name in sizes else "is missing"
            raise ValueError(f"{folder} is damaged: {name}, of {size} bytes, {found}; {_OTHER}")
    return state


def check_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Refuses a tokenizer whose ids mean something else than those that the checkpoint was trained on.

    Raises:
        ValueError: it is another one, or the checkpoint is damaged.
    """
    state = read_state(folder)
    # A checkpoint of a version that stored no fingerprint has nothing to compare.
    if state.tokenizer_fingerprint and state.tokenizer_fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"{folder} was trained with another tokenizer: '{state.tokenizer}', fingerprint "
            f"{state.tokenizer_fingerprint[:12]}; this one is '{tokenizer.name}', fingerprint "
            f"{tokenizer.fingerprint[:12]}. The former is in {folder / TOKENIZER}: put it "
            "back where data.tokenizer is and prepare the data with it, or start a new run under another "
            "name="
        )


def load_tokenizer_of(folder: Path, spec: str) -> Tokenizer:
    """The tokenizer that is stored in a checkpoint; `spec` where a version saved it that stored none.

    Raises:
        ValueError: it is not the one that the checkpoint was trained with, or cannot be read.
    """
    stored = (folder / TOKENIZER, folder / "tokenizer.json")  # the latter: of an earlier version
    tokenizer = load_tokenizer(next((str(path) for path in stored if path.exists()), spec))
    check_tokenizer(folder, tokenizer)
    return tokenizer


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file under `folder`, by its path there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def _all_tensors(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    weights = {name: parameter.detach() for name, parameter in trained.items()}
    assert not weights.keys() & tensors.keys()
    # Not the compute dtype's copies, which FSDP shows while a module is gathered.
    assert all(weight.dtype == torch.float32 for weight in weights.values())
    return {**weights, **tensors}


@contextmanager
def _expected_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        # One rank alone saves without collectives; torch says so each time.
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled.*")
        yield
