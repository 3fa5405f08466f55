"""What computes each operation: Triton's kernels, torch's, or a library that was chosen by name.

Each choice is a module (or object) with the functions of a protocol in tsp/operations.py.
"""

import importlib
from collections.abc import Callable
from dataclasses import fields
from types import ModuleType
from typing import Any, cast

import torch
from megatsp_kernels.common import TARGETS, check_interpreted, chip_of, target_of

from megatsp.cp.fused import FusedBlock
from megatsp.schema import KernelsConfig
from megatsp.tsp.loss import TorchLoss, TritonLoss
from megatsp.tsp.operations import Kernels

_MULTIPLY = ("attention", "loss")  # matrices
# By key and choice. Modules are imported when they are chosen: Triton, and libraries, may be missing.
_CHOICES: dict[str, dict[str, Callable[[], Any]]] = {
    "attention": {
        "torch": lambda: _module("megatsp_kernels.attention.sdpa"),
        "triton": FusedBlock,
        "flash_attn": lambda: _library("megatsp_kernels.attention.flash_attn"),
        "aiter": lambda: _library("megatsp_kernels.attention.aiter"),
    },
    "norm": {
        "torch": lambda: _module("megatsp.tsp.norm"),
        "triton": lambda: _module("megatsp_kernels.rms_norm"),
        "apex": lambda: _library("megatsp_kernels.rms_norm.apex"),
    },
    "rotary": {
        "torch": lambda: _module("megatsp.model.rotary"),
        "triton": lambda: _module("megatsp_kernels.rotary"),
    },
    "swiglu": {
        "torch": lambda: _module("megatsp.tsp.swiglu"),
        "triton": lambda: _module("megatsp_kernels.swiglu"),
    },
    "loss": {"torch": TorchLoss, "triton": TritonLoss},
}


def resolve(config: KernelsConfig, device: torch.device) -> dict[str, str]:
    """The choice of each operation, `auto` replaced: Triton on the GPUs it has tiles for, else torch."""
    default = "triton" if device.type == "cuda" and chip_of(device) in TARGETS else "torch"
    given = {item.name: getattr(config, item.name) for item in fields(config)}
    return {name: default if choice == "auto" else choice for name, choice in given.items()}


def choose_kernels(
    config: KernelsConfig, device: torch.device, dtype: torch.dtype, fake: bool = False
) -> Kernels:
    """The operations as `kernels.*` asks for them, to compute in `dtype`.

    fake: they will see fake tensors alone, so what can run on `device` does not matter.

    Raises:
        ValueError: a choice that cannot run on `device`, or whose library is not installed.
    """
    chosen = resolve(config, device)
    for name, choice in chosen.items():
        if choice == "torch" or fake:
            continue
        try:
            if choice == "triton":
                target_of(device)
                if dtype == torch.bfloat16 and name in _MULTIPLY:
                    check_interpreted("", device)
            elif device.type != "cuda":
                raise ValueError(f"{choice} computes on a GPU alone")
        except ValueError as error:
            raise ValueError(f"kernels.{name}={choice}: {error}; or use kernels.{name}=torch") from error
    return Kernels(**{name: _CHOICES[name][choice]() for name, choice in chosen.items()})


def _module(name: str) -> ModuleType:
    return importlib.import_module(name)


def _library(name: str) -> Any:
    """The adapter of an optional library, once it has found it."""
    adapter = cast(Any, importlib.import_module(name))
    adapter.check()
    return adapter
