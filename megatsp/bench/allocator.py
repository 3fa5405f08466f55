"""A CPU's peak with what operators allocate and free inside themselves: counted, or told by rules.

Of such temporaries one kind is large: where an elementwise operator meets several dtypes, a CPU
converts whole inputs first. A GPU converts each element as it reads it and needs none. Of the others
flash attention's are the largest: half a MiB for each thread that computes, whatever the sizes.

Left out are the copies that gloo makes of what it sends, in its own threads too; NCCL makes none.
"""

from collections.abc import Iterable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch._C._profiler import ProfilerConfig, ProfilerState, _ExperimentalConfig
from torch._prims_common import ELEMENTWISE_TYPE_PROMOTION_KIND, elementwise_dtypes

from megatsp.bench.collectives import NAMESPACES
from megatsp.bench.live_bytes import LiveBytes

_MEMORY_ALONE = ProfilerConfig(
    ProfilerState.CPU,
    False,  # shapes
    True,  # memory
    False,  # stacks
    False,  # flops
    False,  # modules
    _ExperimentalConfig(),
)


class CpuBytes(LiveBytes):
    """LiveBytes of real tensors. allocated_peak: what was alive as an operator began, and its own most.

    torch's profiler tells each allocation of the operator, on the thread that runs it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.allocated_peak = 0

    def start_again(self) -> None:
        super().start_again()
        self.allocated_peak = self.live.total()

    def _call(self, func: Any, args: Any, kwargs: Any) -> Any:
        self._follow_all((args, tuple(kwargs.values())), "activations")
        alive = self.live.total()
        if func.namespace in NAMESPACES:
            return func(*args, **kwargs)
        results, changes = self._changes(func, args, kwargs)
        self.allocated_peak = max(self.allocated_peak, *accumulate(changes, initial=alive))
        return results

    def _changes(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, Iterable[int]]:
        """The operator's results, and the bytes of each of its allocations, negative where it frees."""
        torch.autograd._enable_profiler_legacy(_MEMORY_ALONE)
        try:
            results = func(*args, **kwargs)
        finally:
            threads = torch.autograd._disable_profiler_legacy()
        return results, [
            event.cpu_memory_usage()
            for events in threads
            for event in events
            if event.kind() == "memory_alloc"
        ]


class FakeCpuBytes(CpuBytes):
    """LiveBytes of fake tensors; allocated_peak is what CpuBytes would find, by the rule above."""

    def _changes(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, Iterable[int]]:
        alive = self.live.total()
        results = func(*args, **kwargs)
        converted = _converted_bytes(func, args, results) if torch.Tag.pointwise in func.tags else 0
        if not converted:
            return results, ()
        self._follow_all((results,), "activations")
        return results, [self.live.total() - alive + converted]


def _converted_bytes(func: Any, args: Any, results: Any) -> int:
    """Bytes of an elementwise operator's inputs and result in the dtype common to its inputs."""
    inputs = [arg for arg in args if isinstance(arg, Tensor) and arg.dtype != torch.bool]
    if len({t.dtype for t in inputs}) < 2 or func.overloadpacket is torch.ops.aten.copy_:
        return 0
    numbers = [arg for arg in args if isinstance(arg, Tensor) or type(arg) in (int, float)]
    _, common = elementwise_dtypes(*numbers, type_promotion_kind=ELEMENTWISE_TYPE_PROMOTION_KIND.DEFAULT)
    touched = [*inputs, results] if isinstance(results, Tensor) else inputs
    return sum(t.numel() * common.itemsize for t in touched if t.dtype not in (common, torch.bool))
