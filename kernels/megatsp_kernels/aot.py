"""Kernels compiled for chips that are not here: what is compiled, and what the machine code shows."""

import struct
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatsp_kernels.assembly import Instructions, count, has_system_scope
from megatsp_kernels.chips import CHIPS, Occupancy, occupancy
from megatsp_kernels.common import TARGETS, Config

__all__ = [
    "TARGETS",
    "CompileError",
    "Compiled",
    "Variant",
    "compile_variant",
    "has_system_scope",
    "problems",
]


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


@dataclass(frozen=True)
class Compiled:
    """One kernel's machine code for one chip.

    registers: of a lane, AMD's vgpr and agpr together; agpr, sgpr: 0 on NVIDIA. vgpr_spills, sgpr_spills:
    registers that went to memory (AMD counts them). scratch_bytes: of a lane, where spills and arrays go
    (NVIDIA's stack and local memory). shared_bytes: LDS or shared memory of a workgroup.
    """

    target: str
    registers: int
    agpr: int
    sgpr: int
    vgpr_spills: int
    sgpr_spills: int
    scratch_bytes: int
    shared_bytes: int
    code_bytes: int
    instructions: Instructions
    occupancy: Occupancy


class CompileError(RuntimeError):
    """Triton, LLVM or ptxas refused a kernel."""


def compile_variant(variant: Variant, target: str, large: bool = False) -> Compiled:
    """Compiles as `launch` would on that chip; no GPU is needed. Triton caches what it compiled.

    large: AMD's code for tensors of 2 GiB and more; that for smaller ones addresses them by 32 bits
    (NVIDIA's is the same).

    Raises:
        CompileError: it does not compile.
        ValueError: an argument of the kernel is named neither in the variant's signature nor as a
            constant, or Triton interprets (TRITON_INTERPRET).
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if triton.knobs.runtime.interpret:
        raise ValueError(
            "TRITON_INTERPRET is set: kernels are interpreted in this process and cannot be compiled; start "
            "Python without it"
        )
    chip = CHIPS[target]
    signature, attributes = _arguments(variant, short=chip.is_amd and not large)
    constants = {**variant.config.blocks, **variant.constants}
    source = ASTSource(variant.kernel, signature, constexprs=constants, attrs=attributes)
    place = GPUTarget(chip.backend, chip.arch, chip.warp_size)
    try:
        kernel = triton.compile(source, target=place, options=variant.config.options(target))
    except Exception as error:  # each stage raises its own kind
        raise CompileError(_reason(error)) from error
    if chip.is_amd:
        text, binary = kernel.asm["amdgcn"], kernel.asm["hsaco"]
        resources = _amd_resources(text)
    else:
        text, binary = kernel.asm["ptx"], kernel.asm["cubin"]
        resources = _nvidia_resources(binary)
    return Compiled(
        target=target,
        **resources,
        shared_bytes=kernel.metadata.shared,
        code_bytes=_code_bytes(binary),
        instructions=count(text, target),
        occupancy=occupancy(chip, kernel.metadata.num_warps, resources["registers"], kernel.metadata.shared),
    )


def problems(compiled: Compiled | CompileError, variant: Variant) -> list[str]:
    """What no kernel here may have: the gate that `scripts/aot_report.py --check` is."""
    if isinstance(compiled, CompileError):
        return [f"does not compile: {compiled}"]
    found, limit = compiled.instructions, CHIPS[compiled.target].shared_bytes
    rules = (
        (
            compiled.vgpr_spills,
            f"spills {compiled.vgpr_spills} vector registers: take smaller tiles",
        ),
        (
            compiled.sgpr_spills,
            f"spills {compiled.sgpr_spills} scalar registers: take fewer arguments",
        ),
        (compiled.scratch_bytes, f"takes {compiled.scratch_bytes} bytes of scratch a lane"),
        (
            compiled.shared_bytes > limit,
            f"takes {compiled.shared_bytes} bytes of shared memory; {compiled.target} has {limit}",
        ),
        (variant.matrix and not found.matrix, "has no matrix instructions"),
        (
            variant.waits and not (found.system_acquires and found.system_releases),
            'has no acquire and release at system scope: atomics need sem= and scope="sys"',
        ),
        (
            found.float_atomics,
            "adds floating-point numbers atomically: their order, and so the sum, is open",
        ),
    )
    return [text for broken, text in rules if broken]


def _arguments(variant: Variant, short: bool) -> tuple[dict[str, str], dict[tuple[int], list[list[Any]]]]:
    """Triton's signature and attributes. short: pointers reach no further than 2 GiB."""
    signature, attributes = {}, {}
    constants = {**variant.config.blocks, **variant.constants}
    names = variant.kernel.arg_names
    for index, name in enumerate(names):
        kind = variant.signature.get(name, "constexpr")
        if kind == "constexpr" and name not in constants:
            raise ValueError(f"{variant.label}: argument {name} is neither in its signature nor a constant")
        signature[name] = kind
        is_pointer = kind.startswith("*")
        if is_pointer or name in variant.aligned:
            attributes[(index,)] = [["tt.divisibility", 16]] + [["tt.pointer_range", 32]] * (
                is_pointer and short
            )
    if unknown := {*variant.signature, *constants, *variant.aligned} - {*names}:
        raise ValueError(f"{variant.label}: the kernel has no argument {', '.join(sorted(unknown))}")
    return signature, attributes


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "")
    return f"{type(error).__name__}: {told}"[:300]


def _amd_resources(asm: str) -> dict[str, int]:
    """From the metadata at the assembly's end."""
    found = {}
    for line in asm.splitlines():
        name, _, value = line.strip().removeprefix("- ").partition(":")
        if name.startswith(".") and value.strip().isdecimal():
            found[name] = int(value)
    return dict(
        registers=found[".vgpr_count"],
        agpr=found.get(".agpr_count", 0),
        sgpr=found[".sgpr_count"],
        vgpr_spills=found[".vgpr_spill_count"],
        sgpr_spills=found[".sgpr_spill_count"],
        scratch_bytes=found[".private_segment_fixed_size"],
    )


def _nvidia_resources(cubin: bytes) -> dict[str, int]:
    """From cuobjdump, which comes with Triton. Spills show as stack: ptxas does not count them apart."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {
        name: int(value)
        for name, _, value in (word.partition(":") for word in text.split())
        if value.isdecimal()
    }
    return dict(
        registers=found["REG"],
        agpr=0,
        sgpr=0,
        vgpr_spills=0,
        sgpr_spills=0,
        scratch_bytes=found["STACK"] + found["LOCAL"],
    )


def _code_bytes(elf: bytes) -> int:
    """The size of all .text sections of a 64-bit ELF file."""
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    entry_bytes, entries, names_index = struct.unpack_from("<HHH", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", elf, table + i * entry_bytes) for i in range(entries)]
    names = headers[names_index][4]
    return sum(h[5] for h in headers if elf[names + h[0] :].startswith(b".text"))
