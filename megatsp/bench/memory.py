"""Peak memory of one rank's training step: measured, simulated without the hardware, or alone on a GPU.

Each runs the real `TrainStep` twice and reports the second step: the first leaves the buffers of
FSDP2 and of the device's libraries as every later step finds them.

    measured_memory    on every rank of a real group
    simulated_memory   fake tensors, torch's fake process group: no arithmetic, no other ranks, no GPU
    one_rank_memory    real tensors on the fake process group: the true peak of one rank of many

The last two make and destroy the default process group: one after another in a process is fine, but
not beside a group that exists.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatsp.bench.allocator import CpuBytes, FakeCpuBytes
from megatsp.bench.live_bytes import KINDS, LiveBytes
from megatsp.bench.step import TrainStep
from megatsp.schema import Config


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one rank in one step.

    The five kinds (see `LiveBytes`) are those at the moment of their sum's peak. allocated: the
    allocator's own peak, with the temporaries inside operators; simulated, a CPU's (see
    megatsp.bench.allocator), and None for a GPU's. moved: by collective, as megatsp.bench.collectives
    counts.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    communication: int
    peak: int
    allocated: int | None
    moved: dict[str, int]


def measured_memory(config: Config, device: torch.device) -> StepMemory:
    """This rank's memory in a step of all ranks of the initialised default process group.

    config: validated. Called by all ranks; each returns its own.
    """
    step = TrainStep(config, device)
    live = LiveBytes() if device.type == "cuda" else CpuBytes()
    _hold(step, live)
    with live:
        _warm(step, live)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        step.run()
    if isinstance(live, CpuBytes):
        return _report(live, live.allocated_peak)
    torch.cuda.synchronize(device)
    return _report(live, torch.cuda.max_memory_allocated(device))


def simulated_memory(config: Config, world_size: int, rank: int) -> StepMemory:
    """What rank `rank` of `world_size` would hold: the same step, by shapes alone.

    Fake tensors are the CPU's, whatever launch.device says: a GPU's step has the same shapes. But
    `allocated` is a CPU's alone: it is None where launch.device=cuda.
    config: validated for `world_size` ranks.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake_group(world_size, rank):
        step = TrainStep(config, torch.device("cpu"), fake)
        live = FakeCpuBytes()
        _hold(step, live)
        with fake, live:
            _warm(step, live)
            step.run()
        return _report(live, None if config.launch.device == "cuda" else live.allocated_peak)


def simulated_peak(config: Config, world_size: int) -> StepMemory:
    """The larger of the first and the last rank: shards and visits are uneven from first to last."""
    ranks = sorted({0, world_size - 1})
    return max((simulated_memory(config, world_size, rank) for rank in ranks), key=lambda found: found.peak)


def one_rank_memory(config: Config, world_size: int, rank: int, device: torch.device) -> StepMemory:
    """As `simulated_memory`, but computed on `device`: the true peak of a rank whose peers are not there.

    What should arrive from peers is left as it was or is this rank's own, so losses mean nothing. Weights
    travel by collectives: there is no peer whose memory could be read.

    Raises:
        ValueError: a GPU is asked for and there is none, or parallel.overlap=fused.
    """
    if config.parallel.overlap == "fused":
        raise ValueError("parallel.overlap=fused needs peers, which one rank alone has not: use collective")
    config = replace(config, parallel=replace(config.parallel, overlap="collective"))
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(
                "one rank's true peak needs a GPU, and torch sees none: use launch.device=cpu, or "
                "simulate the memory instead"
            )
        torch.cuda.set_device(device)
    with fake_group(world_size, rank):
        return measured_memory(config, device)


@contextmanager
def fake_group(world_size: int, rank: int) -> Iterator[None]:
    """Inside, this process is rank `rank` of a default process group in which nothing travels."""
    _clear_sharding_prop_cache()  # DTensor remembers shapes by mesh, and the last one's may be another rank's
    dist.init_process_group("fake", store=FakeStore(), world_size=world_size, rank=rank)
    try:
        yield
    finally:
        dist.destroy_process_group()
        _clear_sharding_prop_cache()


def _hold(step: TrainStep, live: LiveBytes) -> None:
    live.hold_model(step.gpt)
    live.hold("optimizer", step.optimizer.tensors().values())
    live.hold("activations", (t for batch in step.batches for t in batch if t is not None))


def _warm(step: TrainStep, live: LiveBytes) -> None:
    step.run()
    live.hold("weights", step.gpt.parameters())  # FSDP2 may have put them into other, padded storages
    live.start_again()


def _report(live: LiveBytes, allocated: int | None) -> StepMemory:
    kinds = {kind: live.peak[kind] for kind in KINDS}
    return StepMemory(**kinds, peak=live.peak.total(), allocated=allocated, moved=dict(live.moved))
