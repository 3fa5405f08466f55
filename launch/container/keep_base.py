"""Holds the base image's GPU packages where they are: pip constraints made of them, and a check afterwards.

    python keep_base.py record FILE    write one `name==version` line for each of those packages
    python keep_base.py check FILE     fail if one of them is now missing or another version

The vendor built torch, Triton and the libraries below them for each other and for the driver's interface. A
wheel of the same name from PyPI installs without complaint and then runs on another vendor's GPUs, or on
none. apex is not held: a step of its own decides whether the base's is usable. Only the standard library is
needed, as this runs before anything is installed.
"""

import argparse
import importlib.metadata
import re
import sys
from pathlib import Path

BASE = re.compile(
    r"torch|torchvision|torchaudio|torch-.*|pytorch-.*|triton|triton-.*|amdgpu-.*|amdsmi|rocm|rocm-.*|hip-.*"
    r"|nvidia-.*|cuda-.*|transformer-engine.*|flash-attn.*|aiter|amd-aiter"
)


def installed() -> dict[str, str]:
    """Version of each package that belongs to the base image, by its normalised name."""
    found = {}
    for distribution in importlib.metadata.distributions():
        name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"] or "").lower()
        if BASE.fullmatch(name):
            found.setdefault(name, distribution.version)  # sys.path's first is the one that is imported
    return found


def record(path: Path) -> None:
    """Writes the constraints.

    Raises:
        SystemExit: there is no torch.
    """
    found = installed()
    if "torch" not in found:
        sys.exit(
            f"keep_base: {sys.executable} has no torch: choose a base image that brings it (rocm/pytorch, "
            "nvcr.io/nvidia/pytorch), and see that its python is the first on PATH"
        )
    path.write_text("".join(f"{name}=={version}\n" for name, version in sorted(found.items())))
    print(f"keep_base: kept as they are: {', '.join(path.read_text().split())}")


def check(path: Path) -> None:
    """Compares what is installed with the constraints.

    Raises:
        SystemExit: a package is missing or changed; the message names each with both versions.
    """
    found = installed()
    before = dict(line.split("==", 1) for line in path.read_text().split())
    changed = [
        f"{name} was {version}, now {found.get(name, 'missing')}"
        for name, version in before.items()
        if found.get(name) != version
    ]
    if changed:
        sys.exit(
            f"keep_base: the installation changed the base image's packages: {'; '.join(changed)}. "
            "Change launch/container/requirements.txt so that it fits them, or take another base image"
        )
    print(f"keep_base: unchanged: {', '.join(before)}")


def main() -> None:
    """The command line above."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["record", "check"])
    parser.add_argument("file", type=Path)
    arguments = parser.parse_args()
    (record if arguments.command == "record" else check)(arguments.file)


if __name__ == "__main__":
    main()
