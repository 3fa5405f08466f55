"""Another mesh's files of the same checkpoint, written by one process in the memory of a few tensors."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from tqdm import tqdm

from megatsp.checkpoint.manifest import (
    SUFFIX,
    FileEntry,
    Manifest,
    TensorEntry,
    check_files,
    raise_damage,
    write_manifest,
)
from megatsp.checkpoint.paths import LATEST, folder_of
from megatsp.checkpoint.state import read_state, state_to_json
from megatsp.checkpoint.storage import ShardWriter
from megatsp.checkpoint.store import write_files
from megatsp.ckpt.layout import differences, held_by_ranks, onto_mesh
from megatsp.ckpt.listing import read_config
from megatsp.ckpt.tensors import Box, StoredTensors
from megatsp.compose import to_yaml
from megatsp.hf.output import check_output, whole_folder
from megatsp.hf.safetensors_file import DTYPES


def reshard(source: Path, output: Path, overrides: Sequence[str]) -> Path:
    """Writes a run folder `output` with the checkpoint `source` as another mesh's ranks would have saved it.

    The tensors are equal to the bit; config.yaml has the new mesh. The state is the same, but that it knows
    no best checkpoint if that is another one. All files of the source are held against their checksums first.

    Returns: the checkpoint.

    Raises:
        Damaged: the source is.
        ValueError: an override is not allowed, the source is of another model, `output` is there already or
            cannot be written.
    """
    check_output(output, False, source)
    config = onto_mesh(read_config(source), overrides)
    check_files(source)
    stored = StoredTensors(source)
    shapes, ranks = held_by_ranks(config, stored.manifest)
    if wrong := differences(shapes, stored.manifest):
        raise ValueError(
            f"{source} does not fit this model; {len(wrong)} tensors differ: {'; '.join(wrong[:8])}"
        )
    state = read_state(source)
    iteration = state.iteration
    if state.best_iteration != iteration:  # that one stays where it is
        state = replace(state, best_iteration=0, best_loss=0.0, evaluations_without_gain=0)
    absolute = output.absolute()
    config = replace(config, name=absolute.name, output_dir=str(absolute.parent))
    with whole_folder(output, False, stored.manifest.bytes) as temporary:
        folder = folder_of(temporary / "checkpoints", iteration)
        changed = {"config.yaml": to_yaml(config).encode(), "state.json": state_to_json(state)}
        _write_shards(stored, ranks, folder, _small_files(stored) | changed)
        (temporary / "config.yaml").write_text(to_yaml(config))
        (temporary / "checkpoints" / LATEST).write_text(f"{iteration}\n")
    return folder_of(output / "checkpoints", iteration)


def _small_files(stored: StoredTensors) -> dict[str, bytes]:
    names = [name for name in stored.manifest.files if not name.endswith(SUFFIX)]
    return {name: (stored.folder / name).read_bytes() for name in names}


def _write_shards(
    stored: StoredTensors, ranks: Sequence[dict[str, Box]], folder: Path, small: dict[str, bytes]
) -> None:
    """Plans as torch does on its coordinator, and then writes each rank's file in turn."""

    def complete(files: dict[str, FileEntry], entries: dict[str, TensorEntry]) -> None:
        raise_damage(folder, [] if entries == stored.manifest.tensors else ["other tensors were written"])
        write_manifest(folder, Manifest(files | write_files(folder, small), entries))

    writer = ShardWriter(folder, lambda: folder.mkdir(parents=True), complete)
    writer.set_up_storage_writer(is_coordinator=True)
    local_plans = [
        SavePlan([_item(stored, *held) for held in rank.items()], planner_data={}) for rank in ranks
    ]
    plans, metadata = DefaultSavePlanner().create_global_plan(local_plans)
    results = []
    total = sum(item.tensor_storage_size() or 0 for plan in plans for item in plan.items)
    quiet = total < 1 << 30 or not sys.stderr.isatty()
    with tqdm(total=total, unit="B", unit_scale=True, desc="resharding", disable=quiet) as bar:
        source = _Source(stored, bar)
        for plan in writer.prepare_global_plan(plans):
            results.append(writer.write_data(plan, source).wait())
    writer.finish(metadata, results)


def _item(stored: StoredTensors, name: str, box: Box) -> WriteItem:
    """What a rank that holds this part of a tensor asks to write."""
    entry = stored.manifest.tensors[name]
    offsets, sizes = torch.Size(box.offsets), torch.Size(box.sizes)
    properties = TensorProperties(DTYPES[entry.dtype])
    data = TensorWriteData(ChunkStorageMetadata(offsets, sizes), properties, torch.Size(entry.shape))
    return WriteItem(MetadataIndex(name, offsets), WriteItemType.SHARD, tensor_data=data)


class _Source(DefaultSavePlanner):
    """Gives the writer each part, read when it is asked for."""

    def __init__(self, stored: StoredTensors, bar: tqdm) -> None:
        super().__init__()
        self._stored, self._bar, self._last = stored, bar, ""

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        assert write_item.tensor_data is not None
        if self._last:
            self._stored.release(self._last)
        self._last, chunk = write_item.index.fqn, write_item.tensor_data.chunk
        self._bar.update(write_item.tensor_storage_size() or 0)
        return self._stored.read(self._last, Box(tuple(chunk.offsets), tuple(chunk.sizes)))
