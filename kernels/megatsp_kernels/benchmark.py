"""What is measured of a kernel, and the least that its shapes cost."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

Made = TypeVar("Made")


@dataclass(frozen=True)
class Benchmark:
    """One operation at one shape.

    flops: 2 for each multiply-add of its matrix products (none: bound by memory). bytes: what must be
    read and written once, by the shapes alone. dtype: of the main tensors.
    make: given the device, builds the inputs and returns what is timed, by name: "megatsp" is ours, the
    others are rivals; a text in a rival's place says why it cannot run there (see `when_importable`).
    """

    name: str
    shape: Mapping[str, int]
    dtype: torch.dtype
    flops: int
    bytes: int
    make: Callable[[torch.device], Mapping[str, Callable[[], Any] | str]]


def when_importable(module: str, build: Callable[[Any], Made]) -> Made | str:
    """What `build` makes of an imported module, to be timed; or why it cannot be imported, to be shown."""
    try:
        return build(importlib.import_module(module))
    except ImportError as error:
        return f"not importable: {error}"
