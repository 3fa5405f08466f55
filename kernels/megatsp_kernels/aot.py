"""Kernels compiled for chips that are not here: what is compiled, and what the machine code shows."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatsp_kernels.common import Config

TARGETS = ("gfx942", "gfx950", "sm_90")


@dataclass(frozen=True)
class Variant:
    """One kernel as it is launched: its arguments' types, its constants, its tiles.

    signature: Triton types of the arguments that are not constexpr, in order ("*bf16", "i32", "fp32");
    pointers and the names in `aligned` are multiples of 16, as at the call.
    constants: the constexprs that are not in config.blocks.
    matrix: there must be matrix instructions. waits: there must be system-scope acquires or releases.
    """

    kernel: Any
    label: str
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    config: Config
    aligned: tuple[str, ...] = ()
    matrix: bool = False
    waits: bool = False
