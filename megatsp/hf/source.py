"""Where whole tensors come from, one at a time: a Hugging Face checkpoint, or one of ours."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megatsp.hf.checkpoint import HFCheckpoint, expected_shapes, shown
from megatsp.hf.safetensors_file import DTYPES, TensorFile
from megatsp.schema import ModelConfig

_PLACES = "DCP_SHARDING_INFO"  # torch's distributed checkpoint: where a file's part of a tensor begins


class TensorSource(Protocol):
    """Whole tensors by name."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of every parameter by name, in the order of the network."""

    def read(self, name: str) -> Tensor:
        """The whole tensor, fp32 or as it is stored. It need not outlive the next one's reading."""


class HFSource:
    """The tensors of a Hugging Face checkpoint, as they are stored."""

    def __init__(self, checkpoint: HFCheckpoint) -> None:
        self.shapes = expected_shapes(checkpoint.model)
        self._files = {
            name: file for path in checkpoint.files for file in [TensorFile(path)] for name in file.entries
        }
        self._last = ""

    def read(self, name: str) -> Tensor:
        if self._last:
            self._files[self._last].release(self._last)
        self._last = name
        return self._files[name].view(name)


class CheckpointSource:
    """The weights of one of our checkpoints, put together from what its ranks saved.

    shapes: of what is wanted of it, by name; None: the model's parameters.

    Raises:
        ValueError: a file is damaged; the weights are not those of the model.
    """

    def __init__(
        self, folder: Path, model: ModelConfig, shapes: dict[str, tuple[int, ...]] | None = None
    ) -> None:
        self.shapes = expected_shapes(model) if shapes is None else shapes
        self._last = ""
        # By tensor: the files that hold a part of it, and where that part begins.
        self._parts: dict[str, list[tuple[TensorFile, tuple[int, ...]]]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            file = TensorFile(path)
            places = json.loads(file.metadata.get(_PLACES, "{}"))
            for name, entry in file.entries.items():
                offsets = tuple(places[name]["saved_offsets"]) if places else (0,) * len(entry.shape)
                self._parts.setdefault(name, []).append((file, offsets))
        if wrong := [name for name, shape in self.shapes.items() if not self._is_whole(name, shape)]:
            raise ValueError(
                f"{folder} lacks {len(wrong)} of the model's {len(self.shapes)} tensors, or parts of them: "
                f"{shown(wrong)}"
            )

    def _is_whole(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether the parts of a tensor, which never overlap, lie in it and fill it."""
        elements = 0
        for file, offsets in self._parts.get(name, []):
            entry = file.entries[name]
            ends = [offset + length for offset, length in zip(offsets, entry.shape, strict=True)]
            if entry.dtype not in DTYPES or len(ends) != len(shape):
                return False
            if any(end > length for end, length in zip(ends, shape, strict=True)):
                return False
            elements += math.prod(entry.shape)
        return elements == math.prod(shape)

    def read(self, name: str) -> Tensor:
        for file, _ in self._parts.get(self._last, []):
            file.release(self._last)
        self._last, parts = name, self._parts[name]
        if len(parts) == 1:
            return parts[0][0].view(name)
        dtype = DTYPES[parts[0][0].entries[name].dtype]
        whole = torch.empty(self.shapes[name], dtype=dtype)
        for file, offsets in parts:
            shape = file.entries[name].shape
            box = tuple(slice(o, o + length) for o, length in zip(offsets, shape, strict=True))
            whole[box] = file.view(name)
            file.release(name)
        return whole
