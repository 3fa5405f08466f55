"""The tensors of one checkpoint, whole or in part, whatever the mesh that saved them."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatsp.checkpoint.manifest import raise_damage, read_manifest, size_problems
from megatsp.checkpoint.storage import Part, find_parts
from megatsp.hf.safetensors_file import DTYPES, TensorFile

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Box:
    """A part of a tensor: its first element's place, and its shape."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.sizes)

    def overlap(self, other: "Box") -> "Box":
        """What both hold; without elements where that is nothing."""
        starts = tuple(map(max, self.offsets, other.offsets))
        bounds = zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True)
        ends = (min(o + n, p + m) for o, n, p, m in bounds)
        return Box(starts, tuple(max(0, end - start) for start, end in zip(starts, ends, strict=True)))

    def within(self, outer: "Box") -> tuple[slice, ...]:
        """Where this box is in a tensor that holds `outer`."""
        places = zip(self.offsets, self.sizes, outer.offsets, strict=True)
        return tuple(slice(o - begin, o - begin + n) for o, n, begin in places)


class StoredTensors:
    """Reads from the mapped files of a checkpoint; it holds no more than what is read at a time.

    manifest: what the checkpoint says it has.

    Raises:
        Damaged: a file is missing or of another size, a header is not readable, parts are missing.
        ValueError: the checkpoint is of a later version.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.manifest = folder, read_manifest(folder)
        raise_damage(folder, size_problems(folder, self.manifest))
        self._parts = find_parts(folder, self.manifest)
        self._ends: dict[str, tuple[Integers, Integers]] = {}
        by_file: dict[str, dict[str, Part]] = {}
        for name, parts in self._parts.items():
            for part in parts:
                by_file.setdefault(part.file, {})[name] = part
        self._files = {
            file: TensorFile(folder / file, {name: part.entry for name, part in parts.items()})
            for file, parts in by_file.items()
        }

    def whole(self, name: str) -> Box:
        shape = self.manifest.tensors[name].shape
        return Box((0,) * len(shape), shape)

    def pieces(self, name: str, box: Box) -> Iterator[tuple[str, Box]]:
        """(file, what it holds of the box), of those that hold any of it."""
        # All parts at once: of a thousand ranks' checkpoint each tensor has as many.
        begins, ends = self._bounds(name)
        starts = np.maximum(begins, np.array(box.offsets, np.int64))
        stops = np.minimum(ends, np.add(np.array(box.offsets, np.int64), np.array(box.sizes, np.int64)))
        for index in np.flatnonzero((stops > starts).all(1)).tolist():
            sizes = tuple((stops[index] - starts[index]).tolist())
            yield self._parts[name][index].file, Box(tuple(starts[index].tolist()), sizes)

    def _bounds(self, name: str) -> tuple[Integers, Integers]:
        """Where each part of a tensor begins and ends: int64 [parts, dims]."""
        if name not in self._ends:
            offsets = np.array([part.offsets for part in self._parts[name]], np.int64)
            sizes = np.array([part.entry.shape for part in self._parts[name]], np.int64)
            self._ends[name] = offsets, offsets + sizes
        return self._ends[name]

    def read(self, name: str, box: Box | None = None) -> Tensor:
        """A tensor, or a box of it, in its stored type; perhaps a view of the mapped file."""
        box = box or self.whole(name)
        found = [(part, Box(part.offsets, part.entry.shape)) for part in self._parts[name]]
        for part, held in found:
            if held.overlap(box) == box:
                return self._files[part.file].view(name, box.within(held))
        tensor = torch.empty(box.sizes, dtype=DTYPES[self.manifest.tensors[name].dtype])
        for part, held in found:
            shared = held.overlap(box)
            if shared.elements:
                file = self._files[part.file]
                tensor[shared.within(box)] = file.view(name, shared.within(held))
                file.release(name)
        return tensor

    def release(self, name: str) -> None:
        """Lets go of the memory that holds what was read of a tensor; it can be read again."""
        for part in self._parts[name]:
            self._files[part.file].release(name)
