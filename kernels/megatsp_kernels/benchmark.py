"""What is measured of a kernel, and the least that its shapes cost."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Benchmark:
    """One operation at one shape.

    flops: 2 for each multiply-add of its matrix products (none: bound by memory). bytes: what must be
    read and written once, by the shapes alone. dtype: of the main tensors.
    make: given the device, builds the inputs and returns what is timed, by name: "megatsp" is ours, the
    others are rivals that can be imported there.
    """

    name: str
    shape: Mapping[str, int]
    dtype: torch.dtype
    flops: int
    bytes: int
    make: Callable[[torch.device], dict[str, Callable[[], Any]]]
