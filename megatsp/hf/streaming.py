"""Modules without memory of their own: their weights are read when they compute, and let go of afterwards."""

from typing import Any

import torch
from torch import Tensor, nn

from megatsp.hf.source import TensorSource


def stream(
    module: nn.Module, prefix: str, source: TensorSource, device: torch.device, dtype: torch.dtype
) -> None:
    """Has `module`, built on the meta device, take its parameters from `source` for each forward pass.

    prefix: of its parameters' names there.
    """
    empty = {name: parameter.data for name, parameter in module.named_parameters()}

    def fill(*_: Any) -> None:
        for name in empty:
            # A copy also where nothing is cast: a source may reuse what it gave.
            _set(module, name, source.read(f"{prefix}.{name}").to(device, dtype, copy=True))

    def free(*_: Any) -> None:
        for name, tensor in empty.items():
            _set(module, name, tensor)

    module.register_forward_pre_hook(fill)
    module.register_forward_hook(free, always_call=True)


def _set(module: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, kind = name.rpartition(".")
    setattr(module.get_submodule(owner), kind, nn.Parameter(tensor, requires_grad=False))
