"""Weights of a Hugging Face checkpoint into a model on any mesh: each rank reads its own slices alone."""

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from megatsp.hf.checkpoint import HFCheckpoint
from megatsp.hf.safetensors_file import Box, TensorFile
from megatsp.model.gpt import GPT
from megatsp.model.parallelize import reshard, share


@torch.no_grad()
def load_weights(checkpoint: HFCheckpoint, gpt: GPT) -> None:
    """Fills every parameter of `gpt`, adapters aside, in the parameter's own type; on all ranks, any mesh.

    Beside the parameters it needs the memory of what it reads of one tensor.

    Raises:
        ValueError: the model is not the checkpoint's.
    """
    reshard(gpt)
    left = {name: parameter for name, parameter in gpt.named_parameters() if ".lora_" not in name}
    for path in checkpoint.files:
        file = TensorFile(path)
        for name, entry in file.entries.items():
            parameter = left.pop(name, None)
            if parameter is None:
                continue  # superfluous, as `open_checkpoint` found
            if entry.shape != tuple(parameter.shape):
                raise ValueError(
                    f"{checkpoint.folder}: {name} is {entry.shape}, the model's {tuple(parameter.shape)}: "
                    "take the model of its config.json"
                )
            target = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            target.copy_(file.view(name, box_of(parameter)))
            file.release(name)
    if left:
        raise ValueError(f"{checkpoint.folder} has no {', '.join(left)}: take the model of its config.json")


def box_of(parameter: nn.Parameter) -> Box:
    """Which part of the whole tensor this rank holds."""
    ranges = [(0, length) for length in parameter.shape]
    if isinstance(parameter, DTensor):
        # The innermost axis cuts first: FSDP cuts what tsp or tp left.
        for axis, placement in reversed(list(enumerate(parameter.placements))):
            if placement.is_replicate():
                continue
            dim = placement.dim  # type: ignore[attr-defined]  # Shard, or FSDP's _StridedShard
            begin, end = ranges[dim]
            mesh = parameter.device_mesh
            start, stop = share(end - begin, mesh.get_local_rank(axis), mesh.size(axis))
            ranges[dim] = begin + start, begin + stop
    return tuple(slice(*ends) for ends in ranges)
