"""Low-rank adapters as files of PEFT: written from our checkpoints, read, and added to weights.

Names: PEFT's `base_model.model.<module>.lora_A.weight` is our `<module>.lora_A.weight`, [r, in]; B is
[out, r].
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatsp.checkpoint.manifest import check_files
from megatsp.checkpoint.state import read_state
from megatsp.compose import from_yaml
from megatsp.hf.adapter_config import check_options, check_targets, config_of, matrices, scales
from megatsp.hf.checkpoint import check_fingerprint, expected_shapes, open_checkpoint, read_json, shown
from megatsp.hf.export import export_source
from megatsp.hf.output import MAX_SHARD_BYTES, check_output
from megatsp.hf.safetensors_file import DTYPES, SHORT, TensorFile, TensorWriter
from megatsp.hf.source import CheckpointSource, HFSource, TensorSource
from megatsp.hf.verify import Report
from megatsp.model.gpt import adapter_shapes
from megatsp.nearest import did_you_mean
from megatsp.schema import MATRICES, Config, ModelConfig

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class Adapter:
    """The adapters of a model's matrices, by module such as model.layers.0.mlp.up_proj.

    a: [r, in]; b: [out, r], fp32. scale: what B A is multiplied with.
    """

    a: Mapping[str, Tensor]
    b: Mapping[str, Tensor]
    scale: Mapping[str, float]

    def update(self, name: str) -> Tensor | None:
        """What is added to the parameter called `name`, fp32 [out, in]; None if nothing is."""
        module = name.removesuffix(".weight")
        if module == name or module not in self.scale:
            return None
        return (self.b[module] @ self.a[module]).mul_(self.scale[module])


class Merged:
    """A source's tensors, each with its adapter added, s B A, in fp32; those without one as they are."""

    def __init__(self, base: TensorSource, adapter: Adapter) -> None:
        self._base, self._adapter = base, adapter

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._base.shapes

    def read(self, name: str) -> Tensor:
        update, weight = self._adapter.update(name), self._base.read(name)
        return weight if update is None else update.add_(weight)


def read_adapter(folder: Path, model: ModelConfig) -> Adapter:
    """The adapters that PEFT saved in a folder, for this model.

    Raises:
        ValueError: a file is missing, damaged or pickled; the adapters need what we do not compute, are of
            modules that the model has not, or of other shapes.
    """
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} has no {CONFIG}, so it is no adapter that PEFT saved")
    if not (folder / WEIGHTS).is_file():
        pickled = (folder / PICKLED).is_file()
        raise ValueError(
            f"{folder} has no {WEIGHTS}"
            + (f", but {PICKLED}: pickled tensors can run code and are not read. Save it again with "
               "save_pretrained(..., safe_serialization=True) where you trust it" if pickled else "")
        )  # fmt: skip
    config = read_json(folder / CONFIG)
    try:
        check_options(config)
        a, b = _read_tensors(TensorFile(folder / WEIGHTS), expected_shapes(model))
        check_targets(config, matrices(expected_shapes(model)), a)
        return Adapter(a, b, scales(config, {module: len(tensor) for module, tensor in a.items()}))
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def _read_tensors(
    file: TensorFile, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A and B by module, fp32, once they fit the model and each other."""
    a: dict[str, Tensor] = {}
    b: dict[str, Tensor] = {}
    known = set(matrices(shapes))
    for name, entry in file.entries.items():
        side = next((side for side in (_A, _B) if name.endswith(side)), None)
        module = name.removeprefix(_PREFIX).removesuffix(side or "")
        if side is None or not name.startswith(_PREFIX):
            raise ValueError(f"{name} in {WEIGHTS}: we know A and B of matrices alone, {_PREFIX}...{_A}")
        if module not in known:
            near = did_you_mean(module, known) or f"; matrices with adapters are {', '.join(MATRICES)}"
            raise ValueError(f"{WEIGHTS} has an adapter of {module}, which the model has not{near}")
        if entry.dtype not in DTYPES:
            raise ValueError(f"{name} is of type {entry.dtype}; we read {', '.join(SHORT.values())}")
        (a if side == _A else b)[module] = file.view(name).float().clone()
    if alone := sorted(a.keys() ^ b.keys()):
        raise ValueError(f"{WEIGHTS} has one of A and B of {shown(alone)}; it is cut off")
    if not a:
        raise ValueError(f"{WEIGHTS} holds no adapter")
    for module in a:
        out, width = shapes[f"{module}.weight"]
        found, rank = (tuple(a[module].shape), tuple(b[module].shape)), a[module].shape[:1]
        if found != ((*rank, width), (out, *rank)):
            raise ValueError(f"A and B of {module} are {found[0]}, {found[1]}; its matrix is {(out, width)}")
    return a, b


def own_adapter(checkpoint_folder: Path) -> tuple[Adapter, Config]:
    """The adapters of one of our checkpoints (`checkpoints/iter_N`), of any mesh, and its configuration.

    Raises:
        ValueError: it is damaged, or has no adapters.
    """
    check_files(checkpoint_folder)
    config = from_yaml((checkpoint_folder / "config.yaml").read_text())
    finetune = config.finetune
    if not finetune.lora_rank:
        raise ValueError(f"{checkpoint_folder} has no adapters: all weights were trained; export them")
    shapes = adapter_shapes(config.model, finetune)
    source = CheckpointSource(checkpoint_folder, config.model, shapes)
    tensors = {name: source.read(name).float().clone() for name in shapes}
    a, b = (
        {name.removesuffix(side): tensor for name, tensor in tensors.items() if name.endswith(side)}
        for side in (_A, _B)
    )
    return Adapter(a, b, dict.fromkeys(a, finetune.lora_alpha / finetune.lora_rank)), config


def write_adapter(checkpoint_folder: Path, output: Path, base: str) -> None:
    """Writes the adapters of one of our checkpoints as PEFT does, fp32: it loads them onto `base`.

    In one process without a process group. base: a folder or a name of the hub, which PEFT is told.

    Raises:
        ValueError: the checkpoint is damaged, or has no adapters; something is at `output`.
    """
    adapter, config = own_adapter(checkpoint_folder)
    check_output(output, force=False)
    if Path(base).expanduser().is_dir():
        base = str(Path(base).expanduser().absolute())  # whoever loads it may be elsewhere
    output.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{_PREFIX}{module}{side}": side_of[module]
        for module in adapter.scale
        for side, side_of in ((_A, adapter.a), (_B, adapter.b))
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    with TensorWriter(output / WEIGHTS, shapes, dict.fromkeys(shapes, "F32"), {"format": "pt"}) as file:
        for name, tensor in tensors.items():
            file.write(name, tensor)
    (output / CONFIG).write_text(json.dumps(config_of(config.finetune, base), indent=2) + "\n")


@torch.no_grad()
def export_merged(
    checkpoint_folder: Path,
    output: Path,
    dtype: str = "auto",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    verify: bool = True,
    force: bool = False,
    base: str = "",
) -> Report | None:
    """Writes what a run with adapters tuned, W + s B A, as `export` writes whole weights.

    base: where the weights are that it tuned; empty: where they were.

    It takes the memory of the adapters and of one tensor. Rounded to bf16, W + s B A loses what of a small
    update lies below bf16's steps: the adapters alone lose nothing.

    Raises:
        ValueError: see `export`; finetune.hf cannot be read, or is not what the run tuned.
    """
    check_output(output, force, checkpoint_folder)
    adapter, config = own_adapter(checkpoint_folder)
    name = base or config.finetune.hf
    opened = open_checkpoint(name)
    check_output(output, force, opened.folder)
    check_fingerprint(opened, name, read_state(checkpoint_folder).base_fingerprint)
    source = Merged(HFSource(opened), adapter)
    return export_source(source, config, output, checkpoint_folder, dtype, max_shard_bytes, verify, force)
