"""What a rank of one measurement does: warm up, then time steps, or follow the memory of one."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatsp.axes import choose_device
from megatsp.bench.exposed import gpu_exposed_s, timed_waits
from megatsp.bench.memory import StepMemory, measured_memory, one_rank_memory, simulated_memory
from megatsp.bench.plain import plain_step, transformers_step
from megatsp.bench.ranks import num_cores
from megatsp.schema import Config


class Step(Protocol):
    """A training step: `run` gives the global loss, a scalar that no host has waited for."""

    def run(self) -> Tensor: ...


StepFactory = Callable[[Config, torch.device], Step]

# Schemes that are no preset of configs/parallel: single-process implementations to compare with.
# Each is a function at the top level of a module, since ranks are told it by name.
REFERENCES: dict[str, StepFactory] = {"plain": plain_step, "transformers": transformers_step}


@dataclass(frozen=True)
class Speed:
    """One timing. seconds: of the slowest rank, all steps; exposed_ms: a step, mean over ranks."""

    seconds: float
    tokens_per_s: float
    exposed_ms: float
    loss: float


def measure_speed(config: Config, factory: StepFactory, warmup: int, steps: int) -> Speed:
    """Runs `warmup` steps, then times `steps`; on all ranks, which return the same.

    config: validated. loss: of the last step, so of the same weights for every scheme.
    """
    device = choose_device(config.launch.device)
    step = factory(config, device)
    for _ in range(warmup):
        step.run()
    _meet(device)
    start = time.perf_counter()
    with timed_waits() as waits:
        for _ in range(steps):
            loss = step.run()
        _synchronize(device)
    seconds = time.perf_counter() - start
    found = loss.item()
    _meet(device)
    exposed_s = gpu_exposed_s(step.run) if device.type == "cuda" else sum(waits) / steps
    slowest, exposed = (torch.tensor(value, device=device) for value in (seconds, exposed_s))
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    dist.all_reduce(exposed)
    seconds = slowest.item()
    tokens = steps * config.trainer.global_batch_size * config.trainer.seq_length
    return Speed(seconds, tokens / seconds, 1e3 * exposed.item() / dist.get_world_size(), found)


def rank_memory(config: Config) -> StepMemory:
    """This rank's memory in a step of all ranks."""
    return measured_memory(config, choose_device(config.launch.device))


def lone_memory(config: Config, world_size: int, rank: int, simulate: bool) -> StepMemory:
    """The memory of one rank of many whose peers are not there; simulated, or on the real device."""
    torch.set_num_threads(max(1, num_cores() // world_size))  # as its ranks would have
    if simulate:
        return simulated_memory(config, world_size, rank)
    return one_rank_memory(config, world_size, rank, choose_device(config.launch.device))


def _meet(device: torch.device) -> None:
    _synchronize(device)
    dist.barrier()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
