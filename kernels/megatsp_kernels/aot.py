"""Kernels compiled for chips that are not here: what is compiled, and what the machine code shows."""

import re
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


def has_system_scope(asm_text: str, target: str) -> bool:
    """Whether machine code (AMD) or PTX acquires and releases for other GPUs too, not for one alone."""
    if target.startswith("gfx"):
        return "buffer_inv sc0 sc1" in asm_text and "buffer_wbl2 sc0 sc1" in asm_text
    instructions = [line.strip() for line in asm_text.splitlines()]
    atoms = [line for line in instructions if re.match(r"(@\S+\s+)?(atom|red|ld|st|fence)\.\S*sys", line)]
    both = any("acq_rel" in line for line in atoms)
    return both or all(any(f".{order}" in line for line in atoms) for order in ("acquire", "release"))
