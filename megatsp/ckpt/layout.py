"""Which rank of a mesh holds which part of every tensor, found in one process without any data."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import product

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset

from megatsp.axes import Axes, axis_sizes
from megatsp.bench.memory import fake_group
from megatsp.checkpoint.manifest import OPTIMIZER, Manifest
from megatsp.ckpt.tensors import Box
from megatsp.compose import override
from megatsp.model.parallelize import lay_out
from megatsp.schema import AXES, Config, ParallelConfig
from megatsp.training.optimizer import MOMENTS
from megatsp.validate import validate


def onto_mesh(stored: Config, overrides: Iterable[str]) -> Config:
    """A checkpoint's validated configuration on another mesh, of launch.nproc ranks.

    With any override of `parallel` its other keys have their defaults, and axes one rank; without, the mesh
    is the stored one. The number of ranks is launch.nproc if that is given, or else what the axes make.

    Raises:
        ValueError: an override that is unknown or not allowed.
    """
    overrides = list(overrides)
    keys = [text.partition("=")[0].lstrip("+") for text in overrides]
    if any(key.startswith("parallel.") for key in keys):
        alone = "launch.nproc" not in keys
        stored = replace(stored, parallel=ParallelConfig(dp_shard=1) if alone else ParallelConfig())
    config = override(stored, overrides)
    sizes = axis_sizes(config.parallel)
    if "launch.nproc" in keys:
        world_size = config.launch.nproc
    elif -1 in sizes:
        axis = AXES[sizes.index(-1)]
        raise ValueError(f"parallel.{axis}=-1: give its ranks, or the number of all by launch.nproc")
    else:
        world_size = math.prod(sizes)
    return validate(replace(config, launch=replace(config.launch, nproc=max(1, world_size))), world_size)


def held_by_ranks(config: Config, manifest: Manifest) -> tuple[dict[str, torch.Size], list[dict[str, Box]]]:
    """(shapes of what a run saves, by name in its order; what each of its ranks holds of them).

    config: validated. manifest: of the checkpoint that it loads, which may have no moments: an imported one.
    """
    world_size = math.prod(axis_sizes(config.parallel))
    with fake_group(world_size, 0):
        gpt = lay_out(config, Axes.build(config.parallel, torch.device("cpu")))
        found: dict[str, tuple[torch.Size, list[Box]]] = {}
        for name, parameter in gpt.named_parameters():
            if parameter.requires_grad:
                assert isinstance(parameter, DTensor)
                found[name] = parameter.shape, boxes(parameter, world_size)
    if any(name.startswith(OPTIMIZER) for name in manifest.tensors):
        moments = {
            f"{OPTIMIZER}{moment}.{name}": of_weight
            for name, of_weight in found.items()
            for moment in MOMENTS
        }
        found |= moments
    shapes = {name: shape for name, (shape, _) in found.items()}
    return shapes, [{name: held[rank] for name, (_, held) in found.items()} for rank in range(world_size)]


def boxes(tensor: DTensor, world_size: int) -> list[Box]:
    """What each rank holds of a tensor whose mesh has all of them."""
    mesh = tensor.device_mesh
    assert mesh.mesh.numel() == world_size, (mesh, world_size)
    found: list[Box] = [Box((), ())] * world_size
    coordinates = product(*map(range, mesh.shape))
    for coordinate, rank in zip(coordinates, mesh.mesh.flatten().tolist(), strict=True):
        sizes, offsets = _compute_local_shape_and_global_offset(
            tensor.shape, mesh.shape, list(coordinate), tensor.placements
        )
        found[rank] = Box(tuple(offsets), tuple(sizes))
    return found


def differences(shapes: Mapping[str, torch.Size], manifest: Manifest) -> list[str]:
    """Why a checkpoint's tensors are not those of a run; one line each."""
    lines = []
    for name in sorted(shapes.keys() | manifest.tensors.keys()):
        wanted = tuple(shapes[name]) if name in shapes else "nothing"
        there = manifest.tensors[name].shape if name in manifest.tensors else "nothing"
        if wanted != there:
            lines.append(f"{name}: wanted {wanted}, found {there}")
    return lines
