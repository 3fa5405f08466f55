"""The version of the GPUs' driver, without torch."""

from pathlib import Path


def driver_version() -> str:
    """Of the kernel's module; "" where there is none, or where it tells none (amdgpu of Linux itself)."""
    files = (Path(f"/sys/module/{name}/version") for name in ("nvidia", "amdgpu"))
    return next((file.read_text().strip() for file in files if file.is_file()), "")
