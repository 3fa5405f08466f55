"""Where a result was measured: hardware, versions, commit."""

import platform
import subprocess
from datetime import datetime
from pathlib import Path

import torch

from megatsp import __version__
from megatsp.bench.ranks import num_cores


def describe_machine() -> dict[str, str]:
    """Names and values, as the table's last line shows them."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "cpu": _cpu_model(),
        "cores": str(num_cores()),
        **({"gpus": f"{len(gpus)} x {gpus[0]}"} if gpus else {}),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "megatsp": __version__,
        "commit": _commit(),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _commit() -> str:
    """Of the checkout that this file is in, with + where it was changed since; "none" without one."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "none"
    return found.stdout.strip() or "none"
