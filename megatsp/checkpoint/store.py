"""Saving and loading by torch's distributed checkpoint, as safetensors: nothing is ever unpickled.

    checkpoints/iter_0000100/           written under a temporary name, renamed when whole
        shard-*.safetensors             each rank's part of every tensor, with its place in the whole
        state.json                      iteration, consumed samples and tokens, tokenizer, W&B run id
        config.yaml                     what the run was started with
        tokenizer/                      the tokenizer's files
        hf/                             of a model from Hugging Face: its config.json and the like
        manifest.json                   every other file's size and checksum, every tensor's type and shape
    checkpoints/latest_checkpointed_iteration.txt
    checkpoints/best_checkpointed_iteration.txt     of fine-tuning: the lowest validation loss

Tensors are logical: weights under their Hugging Face names and `optimizer.<moment>.<name>`. Any
mesh loads what any other saved. Only what is trained is saved: of a run with adapters, these alone.
"""

import shutil
import time
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from megatsp.checkpoint.agree import from_checkpoint_exception, group_rank, on_each, on_first
from megatsp.checkpoint.manifest import (
    OPTIMIZER,
    FileEntry,
    Manifest,
    TensorEntry,
    check_files,
    check_folder,
    entry_of,
    raise_damage,
    sum_problems,
    write_manifest,
)
from megatsp.checkpoint.paths import TOKENIZER, folder_of, install, recover, sync
from megatsp.checkpoint.state import RunState, read_state, state_to_json
from megatsp.checkpoint.storage import ShardReader, ShardWriter, find_parts, os_reason
from megatsp.data.tokenizer import Tokenizer, load_tokenizer
from megatsp.hf.safetensors_file import NAMES


@dataclass(frozen=True)
class Written:
    """A checkpoint that is whole: where, of how many bytes over all files, in how many seconds."""

    folder: Path
    bytes: int
    seconds: float


def write(
    checkpoints: Path,
    state: RunState,
    tensors: dict[str, Tensor],
    extra: Mapping[str, bytes],
    tokenizer: Tokenizer | None,
    group: dist.ProcessGroup | None = None,
) -> Written:
    """Writes one checkpoint on all ranks of `group` and moves the pointer to it last.

    It may run in a thread beside others, with a group of its own. An older one of the iteration is replaced.

    tensors: DTensors, of which each rank writes its part, or plain ones, equal on all ranks. extra: small
    files by relative path. tokenizer: the run's; its files go along, so that the checkpoint needs none of
    what it was read from.

    Raises:
        ValueError: on all ranks, if one cannot write; what was there before is there still.
    """
    since = time.perf_counter()
    folder = folder_of(checkpoints, state.iteration)
    temporary = folder.with_name(folder.name + ".tmp")
    sizes: list[int] = []

    def prepare() -> None:
        try:
            recover(checkpoints)
            for stale in checkpoints.glob("iter_*.tmp"):  # of a save that was cut off
                shutil.rmtree(stale)
            temporary.mkdir(parents=True)
        except OSError as error:
            raise ValueError(f"cannot write {temporary}: {os_reason(error)}") from None

    def complete(files: dict[str, FileEntry], entries: dict[str, TensorEntry]) -> None:
        manifest = Manifest(files | _write_small(temporary, state, extra, tokenizer), entries)
        try:
            write_manifest(temporary, manifest)
            for path in (*(p for p in temporary.rglob("*") if p.is_dir()), temporary):
                sync(path)
            install(temporary, folder, state.iteration)
        except OSError as error:
            raise ValueError(f"cannot write {folder}: {os_reason(error)}") from None
        sizes.append(manifest.bytes)

    try:
        with _expected_warnings():
            dcp.save(tensors, storage_writer=ShardWriter(temporary, prepare, complete), process_group=group)
    except dcp.CheckpointException as error:
        if group_rank(group) == 0:
            shutil.rmtree(temporary, ignore_errors=True)  # no rank writes any more
        raise from_checkpoint_exception(error) from error
    total = on_first(lambda: sum(sizes), group)
    return Written(folder, total, time.perf_counter() - since)


def save(
    checkpoints: Path,
    state: RunState,
    model: nn.Module,
    tensors: dict[str, Tensor],
    extra: Mapping[str, bytes],
    tokenizer: Tokenizer | None = None,
) -> Path:
    """Writes one checkpoint of what the model trains and of `tensors`, on all ranks: see `write`."""
    return write(checkpoints, state, named_tensors(model, tensors), extra, tokenizer).folder


def named_tensors(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a checkpoint of a model holds: the fp32 weights that it trains, and `tensors` beside them."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    weights = {name: parameter.detach() for name, parameter in trained.items()}
    assert not weights.keys() & tensors.keys()
    # Not the compute dtype's copies, which FSDP shows while a module is gathered.
    assert all(weight.dtype == torch.float32 for weight in weights.values())
    return {**weights, **tensors}


def load(
    folder: Path,
    model: nn.Module,
    tensors: dict[str, Tensor],
    verify: str = "checksums",
    group: dist.ProcessGroup | None = None,
) -> RunState:
    """Fills what the model trains and `tensors` in place, on all ranks, from any mesh's checkpoint.

    Of iteration 0 a checkpoint may have none of `tensors`: an imported one, which then keep their values.

    verify: checksums, which are computed while tensors are read, each file by one rank, or sizes.

    Raises:
        Damaged: a file is missing, has another size or checksum, or cannot be read; then the tensors hold
            anything. On all ranks, like any other.
        ValueError: the tensors are those of another model; the version is a later one.
    """

    manifest, state = on_first(lambda: (check_files(folder, "sizes"), read_state(folder)), group)
    wanted = named_tensors(model, tensors)
    if state.iteration == 0 and not any(name in manifest.tensors for name in tensors):
        wanted = named_tensors(model, {})
    check_tensors(folder, manifest, wanted, exactly=state.iteration > 0)
    names = _own_files(manifest, group) if verify == "checksums" else []
    with ThreadPoolExecutor(1) as beside:
        problems = beside.submit(sum_problems, folder, manifest, names)
        fill(folder, manifest, wanted, group)
        lines = [line for of_rank in on_each(problems.result, group) for line in of_rank]
    raise_damage(folder, lines)
    return state


def fill(
    folder: Path, manifest: Manifest, tensors: dict[str, Tensor], group: dist.ProcessGroup | None = None
) -> None:
    """Reads tensors of a checkpoint in place, on all ranks; their names and shapes were checked.

    Raises:
        Damaged: a file cannot be read; on all ranks.
    """
    reader = ShardReader(folder, find_parts(folder, manifest, group), manifest)
    try:
        with _expected_warnings():
            dcp.load(dict(tensors), storage_reader=reader, process_group=group)
    except dcp.CheckpointException as error:
        raise from_checkpoint_exception(error) from error


def check_tensors(
    folder: Path, manifest: Manifest, wanted: Mapping[str, Tensor], exactly: bool = True
) -> None:
    """Checks that a checkpoint holds these tensors, and no other weights.

    exactly: also in their types, which an imported checkpoint has from where it came.

    Raises:
        ValueError: it does not; what differs is named.
    """
    wrong = []
    for name, tensor in wanted.items():
        entry, shape, dtype = manifest.tensors.get(name), tuple(tensor.shape), NAMES.get(tensor.dtype, "")
        if entry is None:
            wrong.append(f"{name}: wanted {shape}, found nothing")
        elif entry.shape != shape:
            wrong.append(f"{name}: wanted {shape}, found {entry.shape}")
        elif exactly and entry.dtype != dtype:
            wrong.append(f"{name}: wanted {dtype}, found {entry.dtype}")
    has_moments = any(name.startswith(OPTIMIZER) for name in wanted)
    for name, entry in manifest.tensors.items():
        if name not in wanted and (has_moments or not name.startswith(OPTIMIZER)):
            wrong.append(f"{name}: wanted nothing, found {entry.shape}")
    if wrong:
        raise ValueError(
            f"{folder} does not fit this model; {len(wrong)} tensors differ: " + "; ".join(wrong[:8])
        )


def check_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Refuses a tokenizer whose ids mean something else than those that the checkpoint was trained on.

    Raises:
        ValueError: it is another one, or the checkpoint is damaged.
    """
    state = read_state(folder)
    # One that was saved without a tokenizer has nothing to compare.
    if state.tokenizer_fingerprint and state.tokenizer_fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"{folder} was trained with another tokenizer: '{state.tokenizer}', fingerprint "
            f"{state.tokenizer_fingerprint[:12]}; this one is '{tokenizer.name}', fingerprint "
            f"{tokenizer.fingerprint[:12]}. The former is in {folder / TOKENIZER}: put it "
            "back where data.tokenizer is and prepare the data with it, or start a new run under another "
            "name="
        )


def load_tokenizer_of(folder: Path, spec: str) -> Tokenizer:
    """The tokenizer that is stored in a checkpoint; `spec` where it has none.

    Raises:
        ValueError: the checkpoint is damaged, or it is not the tokenizer that it was trained with.
    """
    check_folder(folder)
    stored = folder / TOKENIZER
    tokenizer = load_tokenizer(str(stored) if stored.exists() else spec)
    check_tokenizer(folder, tokenizer)
    return tokenizer


def write_files(folder: Path, files: Mapping[str, bytes]) -> dict[str, FileEntry]:
    """Writes small files and brings them to the disk; returns what the manifest says of them.

    Raises:
        ValueError: one cannot be written.
    """
    for name, content in files.items():
        try:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
            sync(folder / name)
        except OSError as error:
            raise ValueError(f"cannot write {folder / name}: {os_reason(error)}") from None
    return {name: entry_of(content) for name, content in files.items()}


def _write_small(
    folder: Path, state: RunState, extra: Mapping[str, bytes], tokenizer: Tokenizer | None
) -> dict[str, FileEntry]:
    files = dict(extra)
    if tokenizer is not None:
        files |= {f"{TOKENIZER}/{name}": content for name, content in tokenizer.files().items()}
        state = replace(state, tokenizer=tokenizer.name, tokenizer_fingerprint=tokenizer.fingerprint)
    return write_files(folder, {**files, "state.json": state_to_json(state)})


def _own_files(manifest: Manifest, group: dist.ProcessGroup | None) -> list[str]:
    """The files that this rank reads through, of all: about as many bytes as every other does."""
    loads = [0] * (dist.get_world_size(group) if dist.is_initialized() else 1)
    own = []
    for name, entry in sorted(manifest.files.items(), key=lambda item: (-item[1].bytes, item[0])):
        rank = loads.index(min(loads))
        loads[rank] += entry.bytes
        if rank == group_rank(group):
            own.append(name)
    return own


@contextmanager
def _expected_warnings() -> Iterator[None]:
    if dist.is_initialized():  # filters are of the process, and this may be one of its threads
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled.*")
        yield
