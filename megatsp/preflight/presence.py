"""What a rank is before anything is measured: on which device of which node, and whether that can be used."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist

from megatsp.preflight.decide import judge_facts
from megatsp.preflight.facts import facts
from megatsp.preflight.guard import first_line
from megatsp.preflight.judge import Place

GPU, CPU = "GPU", "CPU rank"


@dataclass(frozen=True)
class Presence:
    """What a rank says of itself.

    sees_gpu: torch does, there. trouble: why its GPU cannot be used, or "". facts: of first ranks, their
    node's.
    """

    place: Place
    sees_gpu: bool = False
    trouble: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


def look(node: str, local_rank: int, wanted: str) -> Presence:
    """What this rank has. wanted: launch.device."""
    known = {} if local_rank else facts()
    if wanted == "cpu":
        return Presence(Place(node, local_rank, CPU), facts=known)
    trouble, name = _try_gpu(local_rank)
    if known and not trouble:
        known |= _gpu_facts(known)
    return Presence(Place(node, local_rank, GPU, name), torch.cuda.is_available(), trouble, known)


def _try_gpu(local_rank: int) -> tuple[str, str]:
    """(why this rank's GPU cannot be used or "", what it is called). Makes it the current one."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        return f"torch {torch.__version__} sees no GPU", ""
    if local_rank >= count:
        fix = f"give launch.nproc={count}"
        if count == 1:
            fix += ", or, if each task sees one GPU of its own, show it all: srun --gpu-bind=none, in a job "
            fix += "launch.slurm.gpu_request=gpus-per-node without an option that binds"
        return f"{count} GPU{'s' * (count > 1)} for local rank {local_rank}: {fix}", ""
    try:
        torch.cuda.set_device(local_rank)
        torch.ones(1, device="cuda").item()
        return "", _name(torch.cuda.get_device_properties(local_rank))
    except Exception as error:  # whatever it is, it is this node's
        return f"GPU {local_rank} cannot be used: {first_line(error)}", ""


def _name(properties: Any) -> str:
    """Where a GPU sits, as drivers and logs write it; else its UUID."""
    if hasattr(properties, "pci_bus_id"):
        p = properties
        return f"{p.pci_domain_id:04x}:{p.pci_bus_id:02x}:{p.pci_device_id:02x}"
    return str(getattr(properties, "uuid", ""))


def _gpu_facts(known: Mapping[str, Any]) -> dict[str, Any]:
    """Of `facts`, what torch knows better."""
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    versions = {
        **known["versions"],
        "GPU model": ", ".join(dict.fromkeys(p.name for p in properties)),
        "torch's CUDA": torch.version.cuda or "none",
        "torch's HIP": torch.version.hip or "none",
    }
    if dist.is_nccl_available():
        versions["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return {"versions": versions, "gpus": len(properties), "gpu_bytes": [p.total_memory for p in properties]}


def judge_presence(
    present: Sequence[Presence], wanted: str, in_job: bool
) -> tuple[list[Place], dict[str, list[str]]]:
    """(all ranks' places, nodes that cannot be measured with the reasons).

    wanted: launch.device; auto means GPUs if any rank sees one. in_job: spare nodes may take their places.

    Raises:
        ValueError: no node has the GPUs that are wanted, or outside a job one has not.
    """
    on_gpus = wanted == "cuda" or (wanted == "auto" and any(one.sees_gpu for one in present))
    kind = GPU if on_gpus else CPU
    places = [replace(one.place, kind=kind) for one in present]
    names = list(dict.fromkeys(place.node for place in places))
    unfit: dict[str, list[str]] = {}
    for one in present if on_gpus else ():
        if one.trouble:
            unfit.setdefault(one.place.node, []).append(one.trouble)
    if unfit and (not in_job or len(unfit) == len(names)):
        told = "; ".join(f"{node}: {reasons[0]}" for node, reasons in list(unfit.items())[:4])
        raise ValueError(
            f"launch.device={wanted}, but {told}; mend or leave out, or give launch.device=cpu for all"
        )
    ranks = max(sum(place.node == name for place in places) for name in names) if on_gpus else 0
    known = {one.place.node: one.facts for one in present if one.facts and one.place.node not in unfit}
    for node, reasons in judge_facts(known, ranks).items():
        unfit.setdefault(node, []).extend(reasons)
    return places, unfit
