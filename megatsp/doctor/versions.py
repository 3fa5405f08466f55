"""Versions of Python and of the packages that megatsp needs, and what torch was built for."""

import platform
import tomllib
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from megatsp.doctor.finding import OK, PROBLEM, WARNING, Finding

_DEVICE_FILES = {"/dev/kfd": "an AMD GPU", "/dev/nvidia0": "an NVIDIA GPU"}


def stated_requirements() -> tuple[str, list[str]]:
    """What Python and which packages megatsp's pyproject.toml asks for, triton included."""
    checkout = Path(__file__).resolve().parents[2] / "pyproject.toml"
    if checkout.is_file():
        project = tomllib.loads(checkout.read_text())["project"]
        return project["requires-python"], [
            *project["dependencies"],
            *project["optional-dependencies"]["triton"],
        ]
    described = metadata.metadata("megatsp")
    return described["Requires-Python"], described.get_all("Requires-Dist") or []


def installed_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def check_versions(
    python: tuple[str, str],
    requirements: Sequence[str],
    version_of: Callable[[str], str | None],
    on_gpu: bool,
) -> Iterator[Finding]:
    """python: its version, and which are allowed. requirements: pyproject.toml's. on_gpu: needs triton."""
    found, allowed = python
    if SpecifierSet(allowed).contains(found):
        yield Finding("versions", "python", OK, found)
    else:
        yield Finding("versions", "python", PROBLEM, found, f"use a Python {allowed}")
    seen = set()
    for text in requirements:
        wanted = Requirement(text)
        if wanted.marker and not wanted.marker.evaluate({"extra": "triton"}):
            continue
        if wanted.name in seen:
            continue
        seen.add(wanted.name)
        version = version_of(wanted.name)
        fix = f"pip install '{wanted.name}{wanted.specifier}'"
        if version is None and wanted.name == "triton" and not on_gpu:
            yield Finding("versions", "triton", OK, "not installed; nothing needs it on a CPU")
        elif version is None:
            yield Finding("versions", wanted.name, PROBLEM, "not installed", fix)
        elif not wanted.specifier.contains(version, prereleases=True):
            text = f"{version} is not {wanted.specifier}"
            yield Finding("versions", wanted.name, PROBLEM, text, fix)
        else:
            yield Finding("versions", wanted.name, OK, version)


def check_torch_build(
    cuda: str | None, hip: str | None, sees_gpu: bool, device_files: Sequence[str]
) -> Iterator[Finding]:
    """Whether torch's build is for the GPUs of this host.

    cuda, hip: torch.version's. device_files: those of `gpu_files` that are there.
    """
    build = f"ROCm {hip}" if hip else f"CUDA {cuda}" if cuda else "CPU"
    there = [_DEVICE_FILES[name] for name in device_files]
    if there and build == "CPU":
        fix = "install torch from the index of the GPU's builds: README.md, Installation"
        yield Finding("versions", "torch build", PROBLEM, f"for CPU, but this host has {there[0]}", fix)
    elif there and not sees_gpu:
        text = f"for {build}, and this host has {there[0]}, but torch sees none"
        fix = "check the driver (nvidia-smi, rocm-smi), and *_VISIBLE_DEVICES; in containers --gpus, --device"
        yield Finding("versions", "torch build", PROBLEM, text, fix)
    elif build != "CPU" and not sees_gpu:
        fix = "nothing, if this host is to have no GPU (a login node)"
        yield Finding("versions", "torch build", WARNING, f"for {build}, but there is no GPU", fix)
    else:
        yield Finding("versions", "torch build", OK, f"for {build}")


def gpu_files() -> list[str]:
    return [name for name in _DEVICE_FILES if Path(name).exists()]


def python_version() -> str:
    return platform.python_version()
