"""GPUs: how many, which, how much of their memory is free, and whether they reach each other."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations

import torch

from megatsp.doctor.finding import OK, PROBLEM, WARNING, Finding

_FULL = 0.1  # of a GPU's memory that others may hold without a warning


@dataclass(frozen=True)
class Device:
    name: str
    total_bytes: int
    free_bytes: int


def find_devices() -> list[Device]:
    found = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        found.append(Device(torch.cuda.get_device_name(index), total, free))
    return found


def find_strangers(count: int) -> list[tuple[int, int]]:
    """Pairs of GPUs of which the first cannot read the other's memory."""
    return [pair for pair in permutations(range(count), 2) if not torch.cuda.can_device_access_peer(*pair)]


def check_devices(
    devices: Sequence[Device], strangers: Sequence[tuple[int, int]], driver: str, local_ranks: int
) -> Iterator[Finding]:
    """local_ranks: ranks on this host; 0: no launcher started any yet."""
    if not devices:
        yield Finding("devices", "GPUs", OK, "none: runs compute on the CPU")
        return
    names = {device.name for device in devices}
    gib = devices[0].total_bytes / 2**30
    text = f"{len(devices)} x {devices[0].name}, {gib:.0f} GiB; driver {driver or 'not known'}"
    if len(names) > 1:
        fix = "choose equal ones by CUDA_VISIBLE_DEVICES: the slowest sets the pace, the smallest the memory"
        text = f"of {len(names)} kinds: {', '.join(sorted(names))}"
        yield Finding("devices", "GPUs", WARNING, text, fix)
    elif local_ranks > len(devices):
        text = f"{len(devices)} for {local_ranks} ranks of this host"
        fix = f"start {len(devices)} ranks a host, or make all GPUs visible"
        yield Finding("devices", "GPUs", PROBLEM, text, fix)
    else:
        yield Finding("devices", "GPUs", OK, text)
    for index, device in enumerate(devices):
        held = device.total_bytes - device.free_bytes
        if held > _FULL * device.total_bytes:
            text = f"GPU {index}: {held / 2**30:.1f} of {gib:.0f} GiB are held by other processes"
            fix = "end them (nvidia-smi, rocm-smi), or choose other GPUs"
            yield Finding("devices", f"memory of GPU {index}", WARNING, text, fix)
    if strangers:
        one, other = strangers[0]
        text = f"GPU {one} cannot read GPU {other}'s memory, and {len(strangers) - 1} more pairs"
        fix = (
            "enable peer access (IOMMU off or pass-through, ACS off), or keep tsp, tp and cp within linked "
            "GPUs; parallel.overlap=fused cannot run between these"
        )
        yield Finding("devices", "links", WARNING, text, fix)
    elif len(devices) > 1:
        yield Finding("devices", "links", OK, "every GPU reaches every other one's memory")
