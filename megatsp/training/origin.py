"""Where a run comes from, for W&B's configuration and the log: its code, its machines, its job."""

import os
import socket
import subprocess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import megatsp
from megatsp.axes import Axes


def about(axes: Axes) -> dict[str, Any]:
    """code_version (on rank 0 alone, which asks git), mesh and, in a job of Slurm's, slurm; on all ranks."""
    hosts: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(hosts, socket.gethostname())
    is_gpu = axes.device.type == "cuda"
    mesh = {
        "axes": dict(zip(axes.mesh.mesh_dim_names or (), axes.mesh.shape, strict=True)),
        "world_size": len(hosts),
        "device": torch.cuda.get_device_name(axes.device) if is_gpu else "cpu",
        "nodes": len(set(hosts)),
        "host": hosts[0],
    }
    found = {"code_version": code_version() if dist.get_rank() == 0 else {}, "mesh": mesh}
    return found | ({"slurm": job} if (job := slurm_job()) else {})


def code_version() -> dict[str, Any]:
    """megatsp: the version; in a checkout also commit, and dirty: whether tracked files were changed."""
    found: dict[str, Any] = {"megatsp": megatsp.__version__}
    checkout = Path(megatsp.__file__).resolve().parents[1]
    if not (checkout / ".git").exists():
        return found
    commit, changes = _git(checkout, "rev-parse", "HEAD"), _git(checkout, "status", "--porcelain", "-uno")
    if commit is None or changes is None:
        return found
    return found | {"commit": commit.strip(), "dirty": bool(changes.strip())}


def slurm_job() -> dict[str, Any]:
    """job_id (of an array: ARRAY_TASK, as squeue shows it), restart and nodes; {} outside of Slurm."""
    environment = os.environ
    if "SLURM_JOB_ID" not in environment:
        return {}
    job_id = environment["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in environment:
        job_id = f"{environment['SLURM_ARRAY_JOB_ID']}_{environment.get('SLURM_ARRAY_TASK_ID', '')}"
    restart = environment.get("SLURM_RESTART_COUNT", "0")
    return {"job_id": job_id, "restart": restart, "nodes": environment.get("SLURM_JOB_NODELIST", "")}


def _git(checkout: Path, *arguments: str) -> str | None:
    try:
        ran = subprocess.run(
            ["git", *arguments], cwd=checkout, capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):  # there is no git, or its disk hangs
        return None
    return ran.stdout if ran.returncode == 0 else None
