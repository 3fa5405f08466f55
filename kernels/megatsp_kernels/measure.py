"""Times one benchmark: ours and its rivals by turns, with cold caches."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from megatsp_kernels.benchmark import Benchmark

# Overwritten before each call: larger than any cache (an MI300X's last one has 256 MiB), and so long that the
# call is queued before the GPU is done with it: no launch is timed.
FLUSH_BYTES = 2**30
WARMUP = 3


@dataclass(frozen=True)
class Measured:
    """times_ms: of every repetition, by name. failures: why a name has none; "inputs" where all fail."""

    times_ms: Mapping[str, list[float]]
    failures: Mapping[str, str]

    def median_ms(self, name: str) -> float | None:
        times = self.times_ms.get(name)
        return median(times) if times else None


class DeviceLostError(RuntimeError):
    """A kernel left the GPU unusable for this process; nothing more can be measured in it."""


def measure(
    benchmark: Benchmark, device: torch.device, repetitions: int = 20, skip: Mapping[str, str] | None = None
) -> Measured:
    """Times everything that `benchmark.make` offers.

    A repetition visits all of them before the next begins, each time starting with another one. On a GPU
    the times are those between two events around the call, after the caches were overwritten; on a CPU
    those of the clock, without either.

    Args:
        skip: names that are not to be run, with the reason.
    Raises:
        DeviceLostError: names what made the GPU unusable.
    """
    failures: dict[str, str] = {}
    try:
        offered = benchmark.make(device)
    except Exception as error:
        _check_alive(device, "the inputs", error)
        return Measured({}, {"inputs": _reason(error)})
    calls: dict[str, Callable[[], Any]] = {}
    for name, call in offered.items():
        if skip and name in skip:
            failures[name] = skip[name]
        elif isinstance(call, str):
            failures[name] = call
        else:
            calls[name] = call
    for name, call in [*calls.items()]:
        try:
            for _ in range(WARMUP if device.type == "cuda" else 1):
                call()
            _synchronize(device)
        except Exception as error:
            _check_alive(device, name, error)
            failures[name] = _reason(error)
            del calls[name]
    return Measured(_timed(calls, device, repetitions), failures)


def _timed(
    calls: Mapping[str, Callable[[], Any]], device: torch.device, repetitions: int
) -> dict[str, list[float]]:
    names = [*calls]
    times: dict[str, list[float]] = {name: [] for name in names}
    cache = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if device.type == "cuda" else None
    for repetition in range(repetitions):
        first = repetition % max(1, len(names))
        for name in names[first:] + names[:first]:
            times[name].append(_once(calls[name], cache))
    return times


def _once(call: Callable[[], Any], cache: torch.Tensor | None) -> float:
    """Milliseconds of one call."""
    if cache is None:
        began = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - began)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    cache.zero_()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _check_alive(device: torch.device, name: str, error: Exception) -> None:
    """Raises if the GPU does not even finish nothing after this error."""
    try:
        _synchronize(device)
    except Exception as lost:
        raise DeviceLostError(f"{name}: {_reason(error)}") from lost


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]
