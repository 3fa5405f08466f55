"""What to say when memory ran out: what was asked for, what holds it, and which knob frees how much."""

import gc
import math
import re
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from megatsp.model.gpt import GPT
from megatsp.schema import Config
from megatsp.training.memory import peak_memory_gib
from megatsp.training.memory_advice import advice
from megatsp.training.optimizer import AdamW

FOLDER = "out_of_memory"
LARGEST = 20  # tensors that are listed
_HISTORY_ENTRIES = 200_000  # allocations that a snapshot tells of, with the stack of each


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation has failed: on a GPU, in torch's CPU allocator, or in Python."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def record_history(config: Config, device: torch.device) -> None:
    """Starts recording allocations under logging.memory_history; call it before the model is built.

    Raises:
        ValueError: the run computes on a CPU, whose allocations torch does not record.
    """
    if not config.logging.memory_history:
        return
    if device.type != "cuda":
        raise ValueError(
            "logging.memory_history=true: torch records the allocations of GPUs alone, and this run computes "
            f"on a {device.type.upper()}; set logging.memory_history=false (the report names the largest "
            "tensors all the same)"
        )
    torch.cuda.memory._record_memory_history(max_entries=_HISTORY_ENTRIES)


def explain(
    error: BaseException,
    config: Config,
    world_size: int,
    gpt: GPT | None,
    optimizer: AdamW | None,
    folder: Path,
    rank: int,
) -> str:
    """The report of an allocation that failed; also written to <folder>/out_of_memory/rank_00000.txt.

    Call it while the error is handled: so the tensors of the step that failed are still there. With
    logging.memory_history a snapshot for https://pytorch.org/memory_viz lies beside the report.

    Args:
        config: validated.
        gpt, optimizer: None where memory ran out before there was one.
        folder: of the run.
    """
    device = next(gpt.parameters()).device if gpt is not None else torch.device("cpu")
    if gpt is None and isinstance(error, torch.OutOfMemoryError):
        device = torch.device("cuda", torch.cuda.current_device())
    held = find_tensors(gpt, optimizer, device)
    lines = [f"out of memory on rank {rank} of {world_size}: {_asked_for(error)}", *_totals(held, device)]
    lines += [f"the largest {min(LARGEST, len(held))} of {len(held)} tensors:"]
    lines += [f"  {_mib(entry.bytes)}  {entry.name}" for entry in held[:LARGEST]]
    lines += advice(config, world_size)
    report = folder / FOLDER / f"rank_{rank:05d}.txt"
    stack = "".join(traceback.format_exception(error))
    try:
        report.parent.mkdir(parents=True, exist_ok=True)
        if config.logging.memory_history and device.type == "cuda":
            snapshot = report.with_suffix(".pickle")
            torch.cuda.memory._dump_snapshot(str(snapshot))
            lines += [f"snapshot, for https://pytorch.org/memory_viz: {snapshot}"]
        report.write_text("\n".join([*lines, "", stack]))
        lines += [f"this report, with the stack: {report}"]
    except (OSError, RuntimeError) as failure:
        lines += [f"this report could not be written to {report}: {failure}"]
    return "\n".join(lines)


@dataclass(frozen=True)
class Held:
    """Memory that a tensor keeps. kind: parameters, gradients, moments or others."""

    kind: str
    name: str
    bytes: int


def find_tensors(gpt: GPT | None, optimizer: AdamW | None, device: torch.device) -> list[Held]:
    """What Python knows of on a device, the largest first; each piece of memory once, under its best name.

    What only autograd keeps for the backward is not among it: that has no object in Python.
    """
    found: dict[int, Held] = {}
    for kind, name, tensor in [*_named(gpt, optimizer), *_others()]:
        try:
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            if local.device.type != device.type or local.layout != torch.strided:
                continue
            storage = local.untyped_storage()
            place, size = storage.data_ptr(), storage.nbytes()
        except (RuntimeError, NotImplementedError):  # without memory of its own
            continue
        if place and size:
            found.setdefault(place, Held(kind, name or _described(local), size))
    return sorted(found.values(), key=lambda held: -held.bytes)


def _named(gpt: GPT | None, optimizer: AdamW | None) -> Iterator[tuple[str, str, Tensor]]:
    for name, parameter in gpt.named_parameters() if gpt is not None else ():
        yield "parameters", name, parameter
        if parameter.grad is not None:
            yield "gradients", f"gradient of {name}", parameter.grad
    for name, tensor in optimizer.tensors().items() if optimizer is not None else ():
        yield "moments", name, tensor


def _others() -> Iterator[tuple[str, str, Tensor]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecated objects that are merely looked at
        for item in gc.get_objects():
            if issubclass(type(item), Tensor):
                yield "others", "", item


def _described(tensor: Tensor) -> str:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"[{', '.join(map(str, tensor.shape))}] {dtype}"


def _totals(held: list[Held], device: torch.device) -> Iterator[str]:
    sums = dict.fromkeys(("parameters", "gradients", "moments", "others"), 0)
    for entry in held:
        sums[entry.kind] += entry.bytes
    for kind, size in sums.items():
        what = "other tensors that Python sees" if kind == "others" else kind
        yield f"  {_mib(size)}  {what}"
    if device.type == "cuda":
        allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        free, total = torch.cuda.mem_get_info(device)
        yield f"  {_mib(max(0, allocated - sum(sums.values())))}  kept by autograd for the backward"
        yield f"  {_mib(reserved - allocated)}  in the allocator's cache"
        yield f"  {_mib(free)}  free of {_mib(total).strip()} of {torch.cuda.get_device_name(device)}"
    else:
        yield f"  {_mib(int(peak_memory_gib(device) * 2**30))}  held by the process at most"


def _asked_for(error: BaseException) -> str:
    """What the allocation asked for, as the allocator said it."""
    text = str(error).strip().splitlines() or [type(error).__name__]
    if match := re.search(r"tried to allocate (\d+) bytes", text[0]):
        return f"{_mib(int(match[1])).strip()} were asked for"
    if match := re.search(r"Tried to allocate ([\d.]+ \w+)", text[0]):
        return f"{match[1]} were asked for"
    return text[0]


def _mib(size: int) -> str:
    return f"{math.ceil(size / 2**20):>9,} MiB"
