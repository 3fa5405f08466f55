"""The mesh: which ranks share what.

`Axes` is built once from the configuration and passed explicitly. Its mesh dims, outermost
first: dp_replicate (replicas), dp_shard (FSDP), cp (context parallelism), tsp, tp (innermost,
so that a group stays inside a node). Axes of one rank are there too and cost nothing.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megatsp.comm import Comm, Traffic
from megatsp.launcher import STORE
from megatsp.schema import AXES, ParallelConfig
from megatsp.tsp.partition import local_positions, take_local


@dataclass(frozen=True)
class Axes:
    """The meshes, the device, and the counted collectives of the axes that share a sequence.

    mesh: all axes. weights: the same ranks as parameters lie on them: (replicate, shard, model),
    where `model` is tsp or tp and cp is part of `shard` under fsdp_over_cp, else of `replicate`.
    sequence: cp x tsp, the ranks among which attention exchanges keys and values. The Comms share
    one `traffic`.
    """

    mesh: DeviceMesh
    weights: DeviceMesh
    device: torch.device
    cp: Comm
    tsp: Comm
    tp: Comm
    sequence: Comm

    @classmethod
    def build(cls, parallel: ParallelConfig, device: torch.device) -> "Axes":
        """Builds the mesh over all ranks of the initialised default process group.

        Raises:
            ValueError: if the axes do not multiply to the world size.
        """
        sizes = axis_sizes(parallel)
        if torch.Size(sizes).numel() != dist.get_world_size():
            raise ValueError(
                f"{' x '.join(AXES)} = {' x '.join(map(str, sizes))} does not make a world of "
                f"{dist.get_world_size()} ranks: change parallel.* or the number of ranks"
            )
        mesh = init_device_mesh(device.type, sizes, mesh_dim_names=AXES)
        weights = _weights_mesh(parallel, device)
        traffic = Traffic()
        cp, tsp, tp = (Comm(mesh.get_group(name), traffic) for name in ("cp", "tsp", "tp"))
        if cp.size == 1 or tsp.size == 1:
            sequence = tsp if cp.size == 1 else cp
        else:
            sequence = Comm(mesh["cp", "tsp"]._flatten("sequence").get_group(), traffic)
        return cls(mesh, weights, device, cp, tsp, tp, sequence)

    @property
    def traffic(self) -> Traffic:
        return self.tsp.traffic

    @property
    def model(self) -> Comm:
        """The axis that a layer's weights are cut over; tsp or tp."""
        return self.tp if self.tp.size > 1 else self.tsp

    @property
    def has_fsdp(self) -> bool:
        """Whether FSDP2 holds the parameters: some ranks replicate or shard those of this one."""
        return self.weights.size(0) * self.weights.size(1) > 1

    @property
    def dp_size(self) -> int:
        return self.mesh.size(0) * self.mesh.size(1)

    @property
    def dp_rank(self) -> int:
        """Which of the dp_size ranks with different samples this one is."""
        replicate, shard = (self.mesh.get_local_rank(name) for name in AXES[:2])
        return replicate * self.mesh.size(1) + shard

    def take_local(self, tokens: Tensor) -> Tensor:
        """This rank's share of the sequence, [B, T] to [B, T_local]: its zigzag chunks, cut over tp."""
        share = take_local(tokens, self.sequence.rank, self.sequence.size)
        return share.chunk(self.tp.size, 1)[self.tp.rank]

    def spans(self, length: int) -> tuple[tuple[int, int], ...]:
        """Which positions of a sequence `take_local` gives this rank, as runs [start, stop)."""
        own = self.take_local(torch.arange(length)[None])[0]
        starts = [0, *(torch.nonzero(own.diff() != 1)[:, 0] + 1).tolist(), len(own)]
        return tuple((int(own[i]), int(own[j - 1]) + 1) for i, j in pairwise(starts))

    def positions(self, local_length: int) -> Tensor:
        """Global positions of the tokens that this rank's tp group holds: int64 [T_local tp]."""
        length = local_length * self.tp.size * self.sequence.size
        return local_positions(length, self.sequence.rank, self.sequence.size, self.device)


def axis_sizes(parallel: ParallelConfig) -> tuple[int, ...]:
    """Ranks of each axis, in the order of AXES."""
    return tuple(getattr(parallel, name) for name in AXES)


def _weights_mesh(parallel: ParallelConfig, device: torch.device) -> DeviceMesh:
    replicate, shard, cp, tsp, tp = axis_sizes(parallel)
    ranks = torch.arange(dist.get_world_size()).view(replicate, shard, cp, tsp * tp)
    if parallel.fsdp_over_cp:
        ranks = ranks.reshape(replicate, shard * cp, tsp * tp)
    else:
        ranks = ranks.transpose(1, 2).reshape(replicate * cp, shard, tsp * tp)
    return DeviceMesh(device.type, ranks, mesh_dim_names=("replicate", "shard", "model"))


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


def meeting(environ: Mapping[str, str]) -> dict[str, Any]:
    """Where our launcher's local ranks meet, for init_process_group; {}: another launcher says it itself."""
    if STORE not in environ:
        return {}
    rank, world_size = int(environ["RANK"]), int(environ["WORLD_SIZE"])
    return {"init_method": f"file://{environ[STORE]}", "rank": rank, "world_size": world_size}


def join(device: torch.device, timeout_s: float, **where: Any) -> None:
    """Joins the default process group: NCCL's on a GPU, gloo's elsewhere.

    where: init_process_group's store, rank and world_size, if no launcher described them in the environment.
    """
    where = where or meeting(os.environ)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        timeout=timedelta(seconds=timeout_s),
        device_id=device if device.type == "cuda" else None,
        **where,
    )
