"""The registry of checks: each looks at this host and yields what it finds."""

import os
import resource
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from megatsp.bench.ranks import num_cores
from megatsp.doctor import clock, devices, environment, file_systems, kernels, limits, network, versions
from megatsp.doctor.driver import driver_version
from megatsp.doctor.finding import PROBLEM, Finding
from megatsp.training.wandb_run import wandb_mode


@dataclass(frozen=True)
class Host:
    """What the checks are given. output_dir: of runs; it need not exist."""

    output_dir: Path
    environment: Mapping[str, str]

    @cached_property
    def on_gpu(self) -> bool:
        return torch.cuda.is_available()


def _versions(host: Host) -> Iterator[Finding]:
    python, requirements = versions.stated_requirements()
    found = versions.python_version(), python
    yield from versions.check_versions(found, requirements, versions.installed_version, host.on_gpu)
    build = torch.version.cuda, torch.version.hip
    yield from versions.check_torch_build(*build, host.on_gpu, versions.gpu_files())


def _devices(host: Host) -> Iterator[Finding]:
    found = devices.find_devices() if host.on_gpu else []
    ranks = int(host.environment.get("LOCAL_WORLD_SIZE", "0"))
    strangers = devices.find_strangers(len(found))
    yield from devices.check_devices(found, strangers, driver_version(), ranks)


def _kernels(host: Host) -> Iterator[Finding]:
    yield from kernels.check_triton(kernels.import_error("triton"), host.on_gpu)
    shared = Path("/dev/shm")
    yield from kernels.check_shared_memory(shutil.disk_usage(shared).total if shared.is_dir() else None)


def _file_systems(host: Host) -> Iterator[Finding]:
    yield from file_systems.check_output(host.output_dir, file_systems.PROBE_BYTES)


def _limits(host: Host) -> Iterator[Finding]:
    kinds = resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC, resource.RLIMIT_MEMLOCK
    files, processes, locked = map(limits.soft_limit, kinds)
    needs_locked = host.on_gpu or Path("/sys/class/infiniband").is_dir()
    yield from limits.check_limits(files, processes, locked, needs_locked)


def _clock(host: Host) -> Iterator[Finding]:
    try:
        offset, error = clock.file_system_offset(file_systems.nearest_folder(host.output_dir))
    except OSError:
        return  # the check of file systems says so
    yield from clock.check_skew("the file system", offset, error)


def _network(host: Host) -> Iterator[Finding]:
    yield from network.check_name(socket.gethostname())
    yield from network.check_two_ends(network.two_ends_error())


def _environment(host: Host) -> Iterator[Finding]:
    yield from environment.check_environment(host.environment, num_cores())
    try:
        yield from environment.check_wandb(wandb_mode("auto"))
    except ValueError as error:
        yield from environment.check_wandb("", str(error))


CHECKS: Mapping[str, Callable[[Host], Iterator[Finding]]] = {
    "versions": _versions,
    "devices": _devices,
    "kernels": _kernels,
    "file systems": _file_systems,
    "limits": _limits,
    "clock": _clock,
    "network": _network,
    "environment": _environment,
}


def examine(
    output_dir: Path,
    variables: Mapping[str, str] = os.environ,
    checks: Mapping[str, Callable[[Host], Iterator[Finding]]] = CHECKS,
) -> list[Finding]:
    """Runs all checks on this host; one that fails itself is a problem, and the others go on."""
    host = Host(output_dir, variables)
    found: list[Finding] = []
    for name, check in checks.items():
        try:
            found += check(host)
        except Exception as error:  # of a broken installation or driver: that is what is looked for
            text = f"this check itself failed: {type(error).__name__}: {error}"
            found.append(
                Finding(name, "check", PROBLEM, text, "mend what it names, and report it if it is ours")
            )
    return found
