"""Where whole tensors come from, one at a time: a Hugging Face checkpoint, or one of ours."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megatsp.checkpoint.manifest import Manifest, read_manifest
from megatsp.checkpoint.storage import Part, check_parts, read_parts
from megatsp.hf.checkpoint import HFCheckpoint, expected_shapes, shown
from megatsp.hf.safetensors_file import DTYPES, TensorFile
from megatsp.schema import ModelConfig


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
        ValueError: a header is damaged; the weights are not those of the model.
    """

    def __init__(
        self, folder: Path, model: ModelConfig, shapes: dict[str, tuple[int, ...]] | None = None
    ) -> None:
        self.shapes = expected_shapes(model) if shapes is None else shapes
        self._last = ""
        # By tensor: the files that hold a part of it, and where that part begins.
        self._parts: dict[str, list[tuple[TensorFile, tuple[int, ...]]]] = {}
        manifest = read_manifest(folder)
        if wrong := [name for name in self.shapes if not self._is_in(manifest, name)]:
            raise ValueError(
                f"{folder} lacks {len(wrong)} of the model's {len(self.shapes)} tensors, or has them in "
                f"another shape: {shown(wrong)}"
            )
        found: dict[str, list[Part]] = {}
        for path in manifest.shards:
            parts = read_parts(folder, path)
            file = TensorFile(folder / path, {name: part.entry for name, part in parts})
            for name, part in parts:
                found.setdefault(name, []).append(part)
                self._parts.setdefault(name, []).append((file, part.offsets))
        check_parts(folder, manifest, found)

    def _is_in(self, manifest: Manifest, name: str) -> bool:
        return name in manifest.tensors and manifest.tensors[name].shape == self.shapes[name]

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
