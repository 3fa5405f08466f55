"""How torch's distributed checkpoint, which plans what is saved and read by whom, reaches our files.

Every rank writes its parts into one safetensors file, tensor by tensor, and checksums them on the way. The
headers say where in the whole tensor a part lies, as torch's own HuggingFaceStorageReader reads it.
"""

import errno
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from megatsp.checkpoint.agree import group_rank, on_each
from megatsp.checkpoint.manifest import FIX, Damaged, FileEntry, Manifest, TensorEntry, raise_damage
from megatsp.hf.safetensors_file import DTYPES, NAMES, Entry, TensorFile, TensorWriter, read_header

PLACES = "DCP_SHARDING_INFO"  # torch's key in a header: where a file's part of a tensor begins
_THREADS = 4  # that read, a rank


@dataclass(frozen=True)
class Part:
    """A part of a tensor in a file; offsets: of its first element in the whole tensor."""

    file: str
    entry: Entry
    offsets: tuple[int, ...]


def os_reason(error: OSError) -> str:
    """Why the file system refuses, in words."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "the disk is full" if full else error.strerror or type(error).__name__


class ShardWriter(StorageWriter):
    """Writes into `folder`, which it makes; `complete` gets all files and tensors, once, on the coordinator.

    An error of `complete`, as one of any rank's writing, is raised on all ranks by torch, as
    CheckpointException.
    """

    def __init__(
        self,
        folder: Path,
        prepare: Callable[[], None],
        complete: Callable[[dict[str, FileEntry], dict[str, TensorEntry]], None],
    ) -> None:
        self._folder = folder
        self._prepare = prepare
        self._complete = complete

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if is_coordinator:
            self._prepare()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        count = len(plans)
        names = [f"shard-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        return [replace(plan, storage_data=name) for plan, name in zip(plans, names, strict=True)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        name = plan.storage_data
        items = {item.index.fqn: item for item in plan.items if _has_elements(item)}
        # The widest types first: then every tensor lies at a multiple of its width.
        order = sorted(items, key=lambda fqn: -_dtype(items[fqn]).itemsize)
        found: Future[list[WriteResult]] = Future()
        if not items:
            found.set_result([])
            return found
        parts = {fqn: items[fqn].tensor_data for fqn in order}
        places = {fqn: {"saved_offsets": list(part.chunk.offsets)} for fqn, part in parts.items() if part}
        digest = xxhash.xxh3_128()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)  # perhaps not seen yet from this host
            with TensorWriter(
                self._folder / name,
                {fqn: tuple(part.chunk.sizes) for fqn, part in parts.items() if part},
                {fqn: NAMES[_dtype(items[fqn])] for fqn in order},
                {PLACES: json.dumps(places), "DCP_VERSION": "1.0", "format": "pt"},
                digest,
            ) as file:
                for fqn in order:
                    tensor = planner.resolve_data(items[fqn])
                    assert isinstance(tensor, torch.Tensor)
                    file.write(fqn, tensor)
        except OSError as error:
            raise ValueError(f"cannot write {self._folder / name}: {os_reason(error)}") from None
        entry = FileEntry(file.num_bytes, digest.hexdigest())
        found.set_result([WriteResult(MetadataIndex(name), entry.bytes, entry)])
        return found

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        files = {result.index.fqn: result.storage_data for of_rank in results for result in of_rank}
        tensors = {}
        for name, tensor in metadata.state_dict_metadata.items():
            assert isinstance(tensor, TensorStorageMetadata)
            tensors[name] = TensorEntry(NAMES[tensor.properties.dtype], tuple(tensor.size))
        self._complete(files, tensors)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return False  # only we make one


class ShardReader(StorageReader):
    """Reads, of the files of a checkpoint, what a rank needs, and that alone; parts: see `find_parts`."""

    def __init__(self, folder: Path, parts: Mapping[str, list[Part]], manifest: Manifest) -> None:
        self._folder = folder
        self._parts = {(name, part.offsets): part for name, found in parts.items() for part in found}
        self._metadata = Metadata({name: _metadata_of(manifest.tensors[name], parts[name]) for name in parts})

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, list[tuple[ReadItem, Part]]] = {}
        for item in plan.items:
            offsets = item.storage_index.offset
            assert offsets is not None
            part = self._parts[item.storage_index.fqn, tuple(offsets)]
            by_file.setdefault(part.file, []).append((item, part))

        def read(name: str) -> None:
            requests = by_file[name]
            entries = {item.storage_index.fqn: part.entry for item, part in requests}
            try:
                file = TensorFile(self._folder / name, entries)
            except (OSError, ValueError) as error:
                raise Damaged(f"cannot read {self._folder / name}: {error}; {FIX}") from None
            for item, _ in requests:
                box = tuple(slice(o, o + n) for o, n in zip(item.storage_offsets, item.lengths, strict=True))
                target = planner.resolve_tensor(item).detach()
                target.copy_(file.view(item.storage_index.fqn, box))
                planner.commit_tensor(item, target)

        if by_file:
            with ThreadPoolExecutor(min(_THREADS, len(by_file))) as pool:
                list(pool.map(read, by_file))
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return False


def find_parts(
    folder: Path, manifest: Manifest, group: dist.ProcessGroup | None = None
) -> dict[str, list[Part]]:
    """Where the parts of every tensor are; on all ranks, each of which reads some of the headers.

    Raises:
        Damaged: a header is not readable, or the parts do not make what the manifest says.
    """
    rank, size = group_rank(group), dist.get_world_size(group) if dist.is_initialized() else 1

    def own() -> list[tuple[str, Part]]:
        return [found for name in manifest.shards[rank::size] for found in read_parts(folder, name)]

    parts: dict[str, list[Part]] = {}
    for of_rank in on_each(own, group):
        for name, part in of_rank:
            parts.setdefault(name, []).append(part)
    check_parts(folder, manifest, parts)
    return parts


def read_parts(folder: Path, file: str) -> list[tuple[str, Part]]:
    """The parts of tensors, by name, in one file of a checkpoint.

    Raises:
        Damaged: its header cannot be read.
    """
    try:
        entries, metadata = read_header(folder / file)
        places = json.loads(metadata[PLACES]) if PLACES in metadata else None
        found = []
        for name, entry in entries.items():
            offsets = (0,) * len(entry.shape) if places is None else tuple(places[name]["saved_offsets"])
            if len(offsets) != len(entry.shape) or not all(type(o) is int and o >= 0 for o in offsets):
                raise ValueError(f"{name} at {offsets}")
            found.append((name, Part(file, entry, offsets)))
        return found
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise Damaged(f"{folder / file} is damaged: {error}; {FIX}") from None


def check_parts(folder: Path, manifest: Manifest, parts: Mapping[str, Iterable[Part]]) -> None:
    """Checks that the parts make the tensors of the manifest, all of them and no others.

    Raises:
        Damaged: they do not.
    """
    wrong = []
    for name in sorted(manifest.tensors.keys() | parts.keys()):
        tensor = manifest.tensors.get(name)
        found = list(parts.get(name, ()))
        if tensor is None:
            wrong.append(f"{name} is not in the manifest")
        elif not _fills(tensor, found):
            wrong.append(f"{name}, {tensor.dtype} {tensor.shape}, is not made by its {len(found)} parts")
    raise_damage(folder, wrong)


def _fills(tensor: TensorEntry, parts: list[Part]) -> bool:
    """Whether parts of its type lie in a tensor, do not overlap and have as many elements: they make it."""
    for part in parts:
        ends = [offset + length for offset, length in zip(part.offsets, part.entry.shape, strict=True)]
        if part.entry.dtype != tensor.dtype or tensor.dtype not in DTYPES or len(ends) != len(tensor.shape):
            return False
        if any(end > length for end, length in zip(ends, tensor.shape, strict=True)):
            return False
    # Two that begin at one place cannot both be asked for, even if one of them is empty.
    if len({part.offsets for part in parts}) < len(parts):
        return False
    if sum(math.prod(part.entry.shape) for part in parts) != math.prod(tensor.shape):
        return False
    return are_disjoint([(part.offsets, part.entry.shape) for part in parts])


def are_disjoint(boxes: Sequence[tuple[Sequence[int], Sequence[int]]]) -> bool:
    """Whether no two boxes, each its offsets and its lengths, share an element.

    It sweeps along the dimension of the most distinct offsets: n slices of it cost what sorting them costs.
    """
    boxes = [(offsets, lengths) for offsets, lengths in boxes if math.prod(lengths) > 0]
    if len(boxes) < 2:
        return True
    if not boxes[0][0]:
        return False  # numbers without a dimension are one element
    dim = max(range(len(boxes[0][0])), key=lambda d: len({offsets[d] for offsets, _ in boxes}))
    open_ones: list[tuple[Sequence[int], Sequence[int]]] = []  # that reach to where the sweep is
    for offsets, lengths in sorted(boxes, key=lambda box: box[0][dim]):
        open_ones = [box for box in open_ones if box[0][dim] + box[1][dim] > offsets[dim]]
        if any(_overlap(box, (offsets, lengths)) for box in open_ones):
            return False
        open_ones.append((offsets, lengths))
    return True


def _overlap(one: tuple[Sequence[int], Sequence[int]], other: tuple[Sequence[int], Sequence[int]]) -> bool:
    return all(a < b + m and b < a + n for a, n, b, m in zip(*one, *other, strict=True))


def _metadata_of(tensor: TensorEntry, parts: list[Part]) -> TensorStorageMetadata:
    chunks = [ChunkStorageMetadata(torch.Size(p.offsets), torch.Size(p.entry.shape)) for p in parts]
    return TensorStorageMetadata(TensorProperties(DTYPES[tensor.dtype]), torch.Size(tensor.shape), chunks)


def _has_elements(item: WriteItem) -> bool:
    assert item.tensor_data is not None, item  # a checkpoint holds tensors alone
    if item.tensor_data.properties.dtype not in NAMES:
        raise ValueError(
            f"{item.index.fqn} is of type {item.tensor_data.properties.dtype}; a checkpoint holds "
            f"{', '.join(str(dtype) for dtype in NAMES)}"
        )
    return math.prod(item.tensor_data.chunk.sizes) > 0


def _dtype(item: WriteItem) -> torch.dtype:
    assert item.tensor_data is not None
    return item.tensor_data.properties.dtype
