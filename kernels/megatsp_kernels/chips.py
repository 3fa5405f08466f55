"""What a chip can hold, and how many workgroups of a kernel fit it at once."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """Limits of one chip; a `processor` is AMD's compute unit or NVIDIA's streaming multiprocessor.

    backend, arch, warp_size: as Triton names its target.
    shared_bytes: LDS or shared memory that one workgroup may take; processor_shared_bytes: all of a
    processor's; shared_granule_bytes: what is given out; reserved_bytes: taken by the system for each group.
    registers: those of a lane that the warps of one SIMD share; register_granule: given out at once.
    groups: workgroups of several warps that a processor manages.
    """

    backend: str
    arch: str | int
    warp_size: int
    shared_bytes: int
    processor_shared_bytes: int
    shared_granule_bytes: int
    reserved_bytes: int
    registers: int
    register_granule: int
    simds: int
    warps_per_simd: int
    groups: int

    @property
    def is_amd(self) -> bool:
        return self.backend == "hip"


# Sources. gfx942, gfx950: LLVM's AMDGPU target (512 unified registers a lane in granules of 8, 8 waves a
# SIMD, LDS in granules of 512 and 1,280 bytes), AMD's CDNA 3 and CDNA 4 white papers (64 and 160 KiB of LDS
# a compute unit); a workgroup of several waves takes one of 16 barriers.
# sm_90: CUDA C++ programming guide, compute capability 9.0 (65,536 registers; 228 KiB, of which a block may
# take 227; 64 warps; 32 blocks); its occupancy calculator (registers by 256 a warp, 1 KiB a block reserved).
CHIPS: Mapping[str, Chip] = {
    "gfx942": Chip("hip", "gfx942", 64, 65536, 65536, 512, 0, 512, 8, 4, 8, 16),
    "gfx950": Chip("hip", "gfx950", 64, 163840, 163840, 1280, 0, 512, 8, 4, 8, 16),
    "sm_90": Chip("cuda", 90, 32, 232448, 233472, 128, 1024, 512, 8, 4, 16, 32),
}


@dataclass(frozen=True)
class Occupancy:
    """groups: workgroups at once on a processor; warps: theirs, of at most warps_limit.

    limited_by: "registers", "shared memory", "warps", or "groups" (all that a processor manages).
    """

    groups: int
    warps: int
    warps_limit: int
    limited_by: str


def occupancy(chip: Chip, num_warps: int, registers: int, shared_bytes: int) -> Occupancy:
    """An estimate from the limits alone: what the scheduler does with them is its own.

    registers: of a lane, AMD's accumulators included. shared_bytes: of a workgroup.
    """
    # Registers are a SIMD's own: a warp on it cannot use another's.
    each = max(chip.register_granule, _up(registers, chip.register_granule))
    warps_by_registers = min(chip.registers // each, chip.warps_per_simd) * chip.simds
    shared = _up(shared_bytes + chip.reserved_bytes, chip.shared_granule_bytes)
    warps_limit = chip.warps_per_simd * chip.simds
    fits = {
        "groups": warps_limit if chip.is_amd and num_warps == 1 else chip.groups,
        "warps": warps_limit // num_warps,
        "registers": warps_by_registers // num_warps,
        "shared memory": chip.processor_shared_bytes // shared if shared else warps_limit,
    }
    limited_by = min(fits, key=lambda name: fits[name])
    groups = fits[limited_by]
    return Occupancy(groups, groups * num_warps, warps_limit, limited_by)


def _up(value: int, granule: int) -> int:
    return -(-value // granule) * granule
