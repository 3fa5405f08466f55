"""Every check: what it says of a machine that is well, and of one that is not."""

import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from distributed import run_distributed

from megatsp.doctor import clock, devices, environment, file_systems, kernels, limits, network, versions
from megatsp.doctor.checks import CHECKS, Host, examine
from megatsp.doctor.finding import OK, PROBLEM, WARNING, Finding

GIB = 1 << 30
GPU = devices.Device("MI300X", 192 * GIB, 191 * GIB)


def statuses(findings) -> dict[str, str]:
    return {finding.subject: finding.status for finding in findings}


def test_versions():
    requirements = ["torch>=2.11,<2.14", "wandb>=0.19", 'triton>=3.6,<3.10 ; sys_platform == "linux"']
    there = {"torch": "2.13.0+cpu", "wandb": "0.31.0", "triton": "3.9.0"}
    found = list(versions.check_versions(("3.11.7", ">=3.11"), requirements, there.get, on_gpu=True))
    assert statuses(found) == dict.fromkeys(("python", "torch", "wandb", "triton"), OK)
    old = {"torch": "2.10.1", "wandb": None}
    found = list(versions.check_versions(("3.10.2", ">=3.11"), requirements, old.get, on_gpu=True))
    assert statuses(found) == dict.fromkeys(("python", "torch", "wandb", "triton"), PROBLEM)
    assert found[1].fix == "pip install 'torch<2.14,>=2.11'"
    found = versions.check_versions(("3.11.7", ">=3.11"), requirements, old.get, on_gpu=False)
    assert statuses(found)["triton"] == OK
    python, stated = versions.stated_requirements()
    assert python == ">=3.11" and any(text.startswith("torch>=") for text in stated)
    assert any(text.startswith("triton") for text in stated)


@pytest.mark.parametrize(
    ("build", "sees_gpu", "there", "status", "text"),
    [
        ((None, None), False, [], OK, "for CPU"),
        (("12.8", None), True, ["/dev/nvidia0"], OK, "for CUDA 12.8"),
        ((None, "6.4"), True, ["/dev/kfd"], OK, "for ROCm 6.4"),
        ((None, None), False, ["/dev/kfd"], PROBLEM, "for CPU, but this host has an AMD GPU"),
        (("12.8", None), False, ["/dev/nvidia0"], PROBLEM, "but torch sees none"),
        (("12.8", None), False, [], WARNING, "but there is no GPU"),
    ],
)
def test_torch_build(build, sees_gpu, there, status, text):
    (found,) = versions.check_torch_build(*build, sees_gpu, there)
    assert found.status == status and text in found.text


def test_devices():
    assert statuses(devices.check_devices([], [], "", 4)) == {"GPUs": OK}
    found = list(devices.check_devices([GPU] * 8, [], "6.10", 8))
    assert statuses(found) == {"GPUs": OK, "links": OK}
    assert found[0].text == "8 x MI300X, 192 GiB; driver 6.10"
    assert statuses(devices.check_devices([GPU] * 2, [], "", 8))["GPUs"] == PROBLEM
    other = devices.Device("MI210", 64 * GIB, 60 * GIB)
    assert statuses(devices.check_devices([GPU, other], [], "", 2))["GPUs"] == WARNING
    busy = devices.Device("MI300X", 192 * GIB, 100 * GIB)
    assert statuses(devices.check_devices([GPU, busy], [], "", 2))["memory of GPU 1"] == WARNING
    links = next(f for f in devices.check_devices([GPU] * 2, [(0, 1), (1, 0)], "", 2) if f.subject == "links")
    assert links.status == WARNING and "GPU 0 cannot read GPU 1's memory, and 1 more" in links.text


def test_kernels():
    assert [f.status for f in kernels.check_triton("", True)] == [OK]
    assert [f.status for f in kernels.check_triton("ImportError: no", True)] == [PROBLEM]
    assert [f.status for f in kernels.check_triton("ImportError: no", False)] == [OK]
    assert kernels.import_error("json") == ""
    assert kernels.import_error("no_such_module").startswith("ModuleNotFoundError: ")
    assert [f.status for f in kernels.check_shared_memory(16 * GIB)] == [OK]
    assert [f.status for f in kernels.check_shared_memory(64 << 20)] == [WARNING]
    assert [f.status for f in kernels.check_shared_memory(None)] == [WARNING]


def test_space_and_kind():
    def status(kind: str, total: int, free: int) -> str:
        (found,) = file_systems.check_space(Path("/x"), kind, total, free)
        return found.status

    assert status("ext4", 1000 * GIB, 500 * GIB) == OK
    assert status("ext4", 1000 * GIB, 30 * GIB) == WARNING  # 97% used
    assert status("ext4", 100 * GIB, 15 * GIB) == WARNING
    assert status("ext4", 100 * GIB, GIB // 2) == PROBLEM
    assert status("tmpfs", 1000 * GIB, 500 * GIB) == WARNING
    mounts = "/dev/a / ext4 rw 0 0\nserver:/x /mnt/my\\040disk nfs4 rw 0 0\ntmpfs /mnt tmpfs rw 0 0\n"
    assert file_systems.type_of(Path("/mnt/my disk/runs"), mounts) == "nfs4"
    assert file_systems.type_of(Path("/mnt"), mounts) == "tmpfs"
    assert file_systems.type_of(Path("/mntx"), mounts) == "ext4"
    assert file_systems.type_of(Path("/x"), "") == ""


def test_writing_leaves_nothing(tmp_path, monkeypatch):
    found = list(file_systems.check_output(tmp_path / "not" / "yet", probe_bytes=1 << 20))
    assert statuses(found)["locks"] == OK and statuses(found)["writing"] in (OK, WARNING)
    assert list(tmp_path.iterdir()) == []
    assert file_systems.judge_speed(500e6).status == OK
    assert file_systems.judge_speed(20e6).status == WARNING
    assert file_systems.judge_lock("a second one was given").status == PROBLEM
    (found,) = file_systems.check_writing(tmp_path / "nowhere", 1 << 20)
    assert found.status == PROBLEM and "No such file" in found.text

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    (found,) = file_systems.check_writing(tmp_path, 1 << 20)
    assert found.status == PROBLEM and "make room" in found.fix
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_keeps_nobody_out(tmp_path, monkeypatch):
    monkeypatch.setattr(file_systems.fcntl, "flock", lambda *args: None)
    assert file_systems._lock(tmp_path).status == PROBLEM


def test_limits():
    assert set(statuses(limits.check_limits(65536, -1, 65536, False)).values()) == {OK}
    found = statuses(limits.check_limits(1024, 100, 65536, True))
    assert found == {"open files": WARNING, "processes": WARNING, "locked memory": WARNING}
    assert statuses(limits.check_limits(65536, 65536, -1, True))["locked memory"] == OK


def test_clock_skew(tmp_path):
    def status(offset: float, error: float = 0.01) -> str:
        (found,) = clock.check_skew("another", offset, error)
        return found.status

    assert [status(0.1), status(-2.0), status(60.0)] == [OK, WARNING, PROBLEM]
    assert status(2.0, error=1.8) == OK  # it may be 0.2
    offset, error = clock.file_system_offset(tmp_path)
    assert abs(offset) <= error and list(tmp_path.iterdir()) == []


def test_this_clock_is_ahead_of_the_file_systems(tmp_path, monkeypatch):
    monkeypatch.setattr(clock, "time", SimpleNamespace(time=lambda: time.time() + 100))
    offset, error = clock.file_system_offset(tmp_path)
    assert offset == pytest.approx(100, abs=error)


def offset_of_a_late_clock() -> tuple[float, float]:
    """On a rank: rank 1's clock is 5 s late."""
    late = 5.0 * (torch.distributed.get_rank() == 1)
    return clock.offset_to_first(lambda: time.time() - late)


def test_clocks_of_ranks():
    first, late, same = run_distributed(offset_of_a_late_clock, 3)
    assert first == (0.0, 0.0)
    assert late[0] == pytest.approx(-5, abs=late[1] + 0.01)
    assert same[0] == pytest.approx(0, abs=same[1] + 0.01)


def test_network():
    def nobody(name: str) -> str:
        raise OSError(-2, "Name or service not known")

    assert [f.status for f in network.check_name("a", lambda name: "10.0.0.1")] == [OK]
    (found,) = network.check_name("a", nobody)
    assert found.status == WARNING and "/etc/hosts" in found.fix
    assert network.two_ends_error() == ""
    assert [f.status for f in network.check_two_ends("")] == [OK]
    assert [f.status for f in network.check_two_ends("no interface")] == [PROBLEM]


def test_gloo_on_an_interface_that_is_not_there(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nothere0")
    assert "nothere0" in network.two_ends_error()


@pytest.mark.parametrize(
    ("variables", "subject", "status"),
    [
        ({}, "variables", OK),
        ({"OMP_NUM_THREADS": "2", "LOCAL_WORLD_SIZE": "2"}, "variables", OK),
        ({"http_proxy": "http://p:3128", "no_proxy": "localhost,.x"}, "variables", OK),
        ({"CUDA_LAUNCH_BLOCKING": "0"}, "variables", OK),
        ({"PYTHONHASHSEED": "0"}, "PYTHONHASHSEED", OK),
        ({"CUDA_LAUNCH_BLOCKING": "1"}, "CUDA_LAUNCH_BLOCKING", WARNING),
        ({"NCCL_P2P_DISABLE": "1"}, "NCCL_P2P_DISABLE", WARNING),
        ({"NCCL_DEBUG": "info"}, "NCCL_DEBUG", WARNING),
        ({"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}, "TORCH_NCCL_ASYNC_ERROR_HANDLING", WARNING),
        ({"NVIDIA_TF32_OVERRIDE": "1"}, "NVIDIA_TF32_OVERRIDE", WARNING),
        ({"PYTHONOPTIMIZE": "2"}, "PYTHONOPTIMIZE", WARNING),
        ({"HIP_VISIBLE_DEVICES": ""}, "HIP_VISIBLE_DEVICES", WARNING),
        ({"HIP_VISIBLE_DEVICES": "0", "CUDA_VISIBLE_DEVICES": "1"}, "visible devices", PROBLEM),
        ({"OMP_NUM_THREADS": "3", "LOCAL_WORLD_SIZE": "2"}, "OMP_NUM_THREADS", WARNING),
        ({"OMP_NUM_THREADS": "many"}, "OMP_NUM_THREADS", WARNING),
        ({"HTTPS_PROXY": "http://p:3128"}, "proxies", WARNING),
    ],
)
def test_environment(variables, subject, status):
    found = list(environment.check_environment(variables, num_cores=4))
    assert [(f.subject, f.status) for f in found if f.status != OK or f.subject == subject] == [
        (subject, status)
    ]


def test_wandb():
    assert [f.status for m in ("online", "offline", "disabled") for f in environment.check_wandb(m)] == [
        OK
    ] * 3
    assert [f.status for f in environment.check_wandb("", "WANDB_MODE=x")] == [PROBLEM]


def test_every_check_runs_here(tmp_path, monkeypatch):
    monkeypatch.setattr(file_systems, "PROBE_BYTES", 1 << 20)
    found = examine(tmp_path, {})
    assert {finding.check for finding in found} == CHECKS.keys()
    assert not [finding for finding in found if finding.subject == "check"]  # none failed itself


def test_a_check_that_fails_is_a_problem_and_stops_no_other(tmp_path):
    def broken(host: Host):
        raise RuntimeError("the driver is gone")

    def well(host: Host):
        yield Finding("b", "x", OK, str(host.output_dir))

    first, second = examine(tmp_path, {}, {"a": broken, "b": well})
    assert first.status == PROBLEM and "the driver is gone" in first.text
    assert second.text == str(tmp_path)
