"""What the kernels share: where they can run, which tiles they take there, how they are launched.

A kernel's tiles are a table, not the outcome of a measurement at start-up: ranks that chose
differently would round differently, and a resumed run would not be the same run. The first entry of
a chip is the one used; `scripts/bench/kernels.py --tune` measures the others.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

OLDEST_TRITON = (3, 6)
INTERPRETER = "interpreter"
TARGETS = ("gfx942", "gfx950", "sm_90")  # chips that there are tiles for


@dataclass(frozen=True)
class Config:
    """One choice of a kernel's tiles.

    blocks: its constexpr sizes. amd: options that the HIP backend alone knows (waves_per_eu,
    matrix_instr_nonkdim, kpack).
    """

    blocks: Mapping[str, int]
    num_warps: int = 4
    num_stages: int = 2
    amd: Mapping[str, int] = field(default_factory=dict)

    def options(self, target: str) -> dict[str, Any]:
        """Compiler options for a chip; the interpreter has none."""
        if target == INTERPRETER:
            return {}
        options: dict[str, Any] = dict(num_warps=self.num_warps, num_stages=self.num_stages)
        options["enable_fp_fusion"] = True  # a*b+c in one rounding, as torch's own kernels
        return options | dict(self.amd) if target.startswith("gfx") else options


# Configs by chip: "gfx942", "gfx950", "sm_90", and "interpreter" (tiles small enough for odd tests).
Table = Mapping[str, Sequence[Config]]


def target_of(device: torch.device) -> str:
    """The chip's name as tables have it; "interpreter" on a CPU.

    Raises:
        ValueError: Triton is missing or too old, the device is a CPU without TRITON_INTERPRET=1, or a
            chip that no table is made for.
    """
    try:
        import triton
    except ImportError:
        raise ValueError("Triton kernels need triton: pip install 'megatsp[triton]'") from None
    if tuple(int(n) for n in triton.__version__.split(".")[:2]) < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        raise ValueError(f"Triton kernels need triton {oldest} or later; found {triton.__version__}")
    if triton.knobs.runtime.interpret:
        return INTERPRETER
    if device.type != "cuda":
        raise ValueError(
            f"Triton kernels run on a GPU; the tensors are on {device.type} (TRITON_INTERPRET=1, set before "
            "Python starts, runs them on a CPU for tests: slowly)"
        )
    chip = chip_of(device)
    if chip not in TARGETS:
        raise ValueError(f"Triton kernels have tiles for {', '.join(TARGETS)}; this GPU is {chip}")
    return chip


@cache
def chip_of(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def choose(table: Table, device: torch.device) -> tuple[Config, str]:
    """The tiles for this device, and the chip's name."""
    target = target_of(device)
    return table[target][0], target


def launch(kernel: Any, grid: tuple[int, ...], table: Table, *args: Any, **constants: Any) -> None:
    """Runs a kernel on the device of its first tensor, unless the grid is empty."""
    if 0 in grid:
        return
    device = next(a.device for a in args if isinstance(a, Tensor))
    config, target = choose(table, device)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*args, **config.blocks, **constants, **config.options(target))


def check_tensors(op: str, dtypes: Sequence[torch.dtype], **tensors: Tensor) -> None:
    """All on one device where Triton runs, and of one of `dtypes`.

    Raises:
        ValueError: naming the tensor, what it is and what is supported; or as `target_of`.
    """
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if tensor.dtype not in dtypes:
            allowed = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
            raise ValueError(
                f"{op}: {name} is {str(tensor.dtype).removeprefix('torch.')}; it takes {allowed}"
            )
        if tensor.device != first.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, {first_name} on {first.device}")
    if not isinstance(first, FakeTensor):
        target_of(first.device)


def check_factor(op: str, factor: Tensor) -> None:
    """That a tensor can be an operand of matrix products here.

    Raises:
        ValueError: bf16 in Triton's interpreter, whose products of it are wrong.
    """
    if factor.dtype == torch.bfloat16 and not isinstance(factor, FakeTensor):
        check_interpreted(f"{op}: ", factor.device)


def check_interpreted(prefix: str, device: torch.device) -> None:
    """Raises ValueError if it is the interpreter that would multiply bf16 matrices."""
    if target_of(device) == INTERPRETER:
        raise ValueError(f"{prefix}Triton's interpreter multiplies bf16 matrices wrongly: take fp32 or fp16")


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether some of its elements are the same memory, by an expanded dim."""
    return tensor.numel() > 0 and any(
        size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
