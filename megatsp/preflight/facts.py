"""What a node is, as far as it can be told without importing torch: versions, driver, GPUs.

Told once a node, by its first rank: the others share its file system and its devices.
"""

import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from megatsp import __version__
from megatsp.doctor.driver import driver_version

_PACKAGES = (
    "torch", "triton", "triton-rocm", "pytorch-triton-rocm", "nvidia-nccl-cu12", "nvidia-nccl-cu13",
    "rocm", "rocm-sdk-core",
)  # fmt: skip
_TIMEOUT_S = 30  # nvidia-smi waits for ever for a GPU that has fallen off the bus


def facts(root: Path = Path("/")) -> dict[str, Any]:
    """The node's facts, as JSON takes them.

    versions: of python, megatsp, ROCm and those of our packages that are installed. driver: "" if none is
    known. gpus: how many. gpu_bytes: memory of each, [] where nobody tells. gpu_error: what nvidia-smi
    said when it failed, or "".

    root: where proc, sys and opt are found.
    """
    versions = {"python": platform.python_version(), "megatsp": __version__}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    rocm = root / "opt/rocm/.info/version"  # RCCL comes with it
    if rocm.is_file():
        versions["ROCm"] = rocm.read_text().strip()
    return {"versions": versions, "driver": driver_version(), **_gpus(root)}


def _gpus(root: Path) -> dict[str, Any]:
    nvidia, error = root / "proc/driver/nvidia/gpus", ""
    if nvidia.is_dir():
        count = len(list(nvidia.iterdir()))
        memory, error = _nvidia_memory() if shutil.which("nvidia-smi") else ([], "")
    else:
        files = sorted((root / "sys/class/drm").glob("card*/device/mem_info_vram_total"), key=_card)
        memory = [int(file.read_text()) for file in files]
        count = len(memory)
    return {"gpus": count, "gpu_bytes": memory, "gpu_error": error}


def _card(file: Path) -> int:
    """The number of a card, card10 after card9."""
    return int("".join(filter(str.isdigit, file.parts[-3])) or 0)


def _nvidia_memory() -> tuple[list[int], str]:
    """(bytes of each GPU, what went wrong)."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return [], f"nvidia-smi has not answered in {_TIMEOUT_S} s"
    lines = [line.strip() for line in asked.stdout.split("\n") if line.strip()]
    odd = [line for line in lines if not line.isdigit()]  # such as [GPU is lost], with status 0
    if asked.returncode or odd:
        return [], " ".join(f"nvidia-smi: {asked.stdout} {asked.stderr}".split())[:300]
    return [int(line) << 20 for line in lines], ""
