"""Exposed communication: the time in which a rank waits for others and computes nothing."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

Interval = tuple[float, float]  # start and end


@contextmanager
def timed_waits() -> Iterator[list[float]]:
    """The seconds of every wait for a collective inside the block, on whichever thread.

    All of torch.distributed and FSDP2 wait by `Work.wait`, blocking collectives too. Not seen are
    functional collectives, which wait in C++; no step of ours posts any.
    """
    seconds: list[float] = []
    wait = dist.Work.wait

    def timed_wait(work: dist.Work, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return wait(work, *args, **kwargs)
        finally:
            seconds.append(time.perf_counter() - start)

    patched: Any = dist.Work
    patched.wait = timed_wait
    try:
        yield seconds
    finally:
        patched.wait = wait


def gpu_exposed_s(step: Callable[[], Any]) -> float:
    """Seconds of one step in which NCCL kernels run on this GPU and no other kernel does.

    Profiles one step, which is slower than others: call it outside of what is timed. Written
    against torch's profiler; it has not run on a GPU yet.
    """
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    communication: list[Interval] = []
    computation: list[Interval] = []
    for event in profiler.events() or ():
        if event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        is_nccl = "nccl" in event.name.lower()  # RCCL's kernels are named so too
        (communication if is_nccl else computation).append((event.time_range.start, event.time_range.end))
    return 1e-6 * uncovered(communication, computation)


def uncovered(intervals: Iterable[Interval], cover: Iterable[Interval]) -> float:
    """The total length of what lies in some interval of the first kind and in none of the second."""
    return _length([*intervals, *(cover := [*cover])]) - _length(cover)


def _length(intervals: Iterable[Interval]) -> float:
    """Of the union."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        if end > reached:
            total += end - max(start, reached)
            reached = end
    return total
