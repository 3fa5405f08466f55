"""The mesh: which ranks share what.

`Axes` is built once from the configuration and passed explicitly. Its mesh dims, outermost
first: dp_replicate (replicas), dp_shard (FSDP), tsp (innermost, so that a group stays
inside a node). Axes of one rank are there too and cost nothing.
"""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megatsp.comm import Comm, Traffic
from megatsp.schema import ParallelConfig

NAMES = ("dp_replicate", "dp_shard", "tsp")


@dataclass(frozen=True)
class Axes:
    """One DeviceMesh, its device, and the counted collectives of the tsp axis."""

    mesh: DeviceMesh
    device: torch.device
    tsp: Comm

    @classmethod
    def build(cls, parallel: ParallelConfig, device: torch.device) -> "Axes":
        """Builds the mesh over all ranks of the initialised default process group.

        Raises:
            ValueError: if the axes do not multiply to the world size.
        """
        sizes = (parallel.dp_replicate, parallel.dp_shard, parallel.tsp)
        if sizes[0] * sizes[1] * sizes[2] != dist.get_world_size():
            raise ValueError(
                f"dp_replicate x dp_shard x tsp = {sizes[0]} x {sizes[1]} x {sizes[2]} does not make "
                f"a world of {dist.get_world_size()} ranks: change parallel.* or the number of ranks"
            )
        mesh = init_device_mesh(device.type, sizes, mesh_dim_names=NAMES)
        return cls(mesh, device, Comm(mesh.get_group("tsp"), Traffic()))

    @property
    def dp_size(self) -> int:
        return self.mesh.size(0) * self.mesh.size(1)

    @property
    def dp_rank(self) -> int:
        """Which of the dp_size ranks with different samples this one is."""
        replicate, shard = (self.mesh.get_local_rank(name) for name in NAMES[:2])
        return replicate * self.mesh.size(1) + shard


def choose_device(wanted: str) -> torch.device:
    """launch.device, resolved: this process's own GPU, or the CPU.

    Raises:
        ValueError: if a GPU is wanted and there is none.
    """
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise ValueError(
            "launch.device=cuda, but torch sees no GPU: use launch.device=cpu, or install a CUDA or "
            f"ROCm build of torch (this one is {torch.__version__})"
        )
    if wanted == "cpu" or not available:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def join(device: torch.device, timeout_s: int) -> None:
    """Joins the default process group that the launcher described in the environment."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        timeout=timedelta(seconds=timeout_s),
        device_id=device if device.type == "cuda" else None,
    )
