"""The least time that a benchmark's FLOPs and bytes need on a GPU."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatsp_kernels.benchmark import Benchmark

MATRIX_DTYPES = (torch.bfloat16, torch.float16)  # those whose peak is listed


@dataclass(frozen=True)
class Machine:
    """peak_tflops: the vendor's, bf16, dense. gemm_tflops: what torch's products reach. copy_tbps: bytes read
    and written by a copy, measured; in 10^12 a second."""

    name: str
    peak_tflops: float
    gemm_tflops: float
    copy_tbps: float


# Peaks: the vendors' data sheets. MI300X: published measurements of GEMM and copy. H200: torch 2.11 measured,
# bf16 on random data (770 to 800) and a copy of 8.6 GB.
MACHINES = (Machine("MI300X", 1307, 708, 4.3), Machine("H200", 989, 785, 4.3))


@dataclass(frozen=True)
class Floor:
    """Microseconds. least_us: at the vendor's peak; reachable_us: at what products reach. bound: "compute",
    "memory", or, where the dtype's peak is not listed, "memory (products not counted)"."""

    least_us: float
    reachable_us: float
    bound: str


def intensity(benchmark: Benchmark) -> float:
    """FLOPs a byte."""
    return benchmark.flops / benchmark.bytes


def floor(benchmark: Benchmark, machine: Machine) -> Floor:
    """What the shapes alone cost; a kernel that reads anything twice takes longer.

    Source: Williams et al., Roofline, CACM 52 (4), 2009.
    """
    memory_us = benchmark.bytes / machine.copy_tbps / 1e6
    if benchmark.flops and benchmark.dtype not in MATRIX_DTYPES:
        return Floor(memory_us, memory_us, "memory (products not counted)")
    least_us, gemm_us = (benchmark.flops / rate / 1e6 for rate in (machine.peak_tflops, machine.gemm_tflops))
    bound = "compute" if gemm_us > memory_us else "memory"
    return Floor(max(least_us, memory_us), max(gemm_us, memory_us), bound)


def machine_named(gpu: str, machines: Sequence[Machine] = MACHINES) -> Machine | None:
    """The machine of a GPU's name ("NVIDIA H200"), if it is listed."""
    return next((machine for machine in machines if machine.name in gpu), None)
