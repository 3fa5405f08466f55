"""What one rank writes of a state, copied to host memory: training may then change the tensors.

torch's own StateDictStager copies by deepcopy: meshes, and whole storages with what is padding. Here a part
is a plain tensor with its place in the whole, which is written without a mesh or a GPU.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

_ALIGNMENT_BYTES = 64


class HostPart(Tensor):
    """One rank's part of a logical tensor, whose shape it says; it can be saved, and not computed with.

    torch's distributed checkpoint takes it by the protocol that DTensor implements too.
    """

    part: Tensor | None  # None: this rank writes nothing of it
    _offsets: torch.Size

    @staticmethod
    def __new__(
        cls, dtype: torch.dtype, shape: torch.Size, part: Tensor | None, offsets: Sequence[int]
    ) -> Any:
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=torch.device("cpu"))
        self.part, self._offsets = part, torch.Size(offsets)
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise AssertionError(f"{func} of a part that is only saved")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        part = None if self.part is None else tuple(self.part.shape)
        return f"HostPart({part} at {tuple(self._offsets)} of {tuple(self.shape)})"

    def __create_write_items__(self, name: str, _: Any) -> list[WriteItem]:
        if self.part is None:
            return []
        data = TensorWriteData(
            self.__create_chunk_list__()[0], TensorProperties.create_from_tensor(self.part), self.shape
        )
        return [WriteItem(MetadataIndex(name, self._offsets), WriteItemType.SHARD, tensor_data=data)]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [] if self.part is None else [ChunkStorageMetadata(self._offsets, self.part.shape)]

    def __get_tensor_shard__(self, _: Any) -> Tensor:
        assert self.part is not None
        return self.part


class Staging:
    """Buffers in host memory, which are kept from copy to copy."""

    def __init__(self, group: ProcessGroup | None = None) -> None:
        """group: of all ranks that save; None: all there are."""
        self._group = group
        self._buffer, self._is_pinned = torch.empty(0, dtype=torch.uint8), False

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, HostPart]:
        """Copies what this rank writes; the copies of the call before are overwritten.

        tensors: DTensors of any placements but partial ones, and plain tensors, equal on all ranks; in host
        memory or on one GPU. Of equal parts one rank alone copies each. No communication.
        """
        places = _places(tensors, self._group)
        sizes = [_aligned(place.local) if place.writes else 0 for place in places.values()]
        devices = {place.local.device for place in places.values() if place.local.is_cuda}
        self._reserve(sum(sizes), pinned=bool(devices))
        parts, start = {}, 0
        for (name, place), size in zip(places.items(), sizes, strict=True):
            part = None
            if place.writes:
                flat = self._buffer[start : start + place.local.nbytes].view(place.local.dtype)
                part = flat.view(place.local.shape).copy_(place.local, non_blocking=True)
            parts[name] = HostPart(place.local.dtype, place.shape, part, place.offsets)
            start += size
        for device in devices:
            torch.cuda.current_stream(device).synchronize()  # once for all copies
        return parts

    def view(self, tensors: Mapping[str, Tensor]) -> dict[str, HostPart]:
        """What this rank writes, uncopied: to be saved before training goes on. tensors: in host memory."""
        return {
            name: HostPart(
                place.local.dtype, place.shape, place.local if place.writes else None, place.offsets
            )
            for name, place in _places(tensors, self._group).items()
        }

    def _reserve(self, num_bytes: int, pinned: bool) -> None:
        if self._buffer.numel() >= num_bytes:
            return
        self.close()
        self._buffer = torch.empty(num_bytes, dtype=torch.uint8)
        if pinned:  # not by pin_memory=True, which takes the next power of two
            runtime = torch.cuda.cudart()
            torch.cuda.check_error(runtime.cudaHostRegister(self._buffer.data_ptr(), num_bytes, 0))
            self._is_pinned = True

    def close(self) -> None:
        """Gives the memory back; the copies must not be used any more."""
        if self._is_pinned:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(self._buffer.data_ptr()))
        self._buffer, self._is_pinned = torch.empty(0, dtype=torch.uint8), False


@dataclass(frozen=True)
class _Place:
    """What this rank holds of a tensor of a shape, and whether it is the one that writes it."""

    local: Tensor
    shape: torch.Size
    offsets: tuple[int, ...]
    writes: bool


def _places(tensors: Mapping[str, Tensor], group: ProcessGroup | None) -> dict[str, _Place]:
    """Of equal parts each goes to the rank that writes least so far: all its holders reckon alike."""
    loads: defaultdict[Any, dict[int, int]] = defaultdict(dict)  # bytes by holder, for every set of holders
    places = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        if isinstance(tensor, DTensor):
            mesh, placements, local = tensor.device_mesh, tensor.placements, tensor.to_local()
            assert not any(placement.is_partial() for placement in placements)
            coordinate = mesh.get_coordinate()
            if coordinate is None:  # this rank has no part in it
                places[name] = _Place(local, tensor.shape, (0,) * tensor.dim(), writes=False)
                continue
            sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
            assert tuple(local.shape) == tuple(sizes)
            dims = tuple(dim for dim, placement in enumerate(placements) if placement.is_replicate())
            key: Any = (mesh, dims)
            count, own = math.prod(mesh.size(dim) for dim in dims), 0
            for dim in dims:
                own = own * mesh.size(dim) + coordinate[dim]
        else:
            local, offsets, key = tensor, (0,) * tensor.dim(), None
            count, own = dist.get_world_size(group), dist.get_rank(group)
        load = loads[key]
        writer = min(range(count), key=lambda holder: load.get(holder, 0))
        load[writer] = load.get(writer, 0) + local.nbytes
        places[name] = _Place(local, tensor.shape, offsets, writer == own and local.numel() > 0)
    return places


def _aligned(tensor: Tensor) -> int:
    """Bytes of a tensor in the buffer."""
    return -(-tensor.nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
