"""A CPU's peak with what operators allocate and free inside themselves: counted, or told by rules.

Three kinds of such temporaries are large enough to matter. Where an elementwise operator meets several
dtypes, a CPU converts whole inputs first; a GPU converts each element as it reads it. A CPU's flash
attention has a block of scores for each thread, and copies inputs into the order it wants. And
logsumexp, on any device, holds the exponentials of its whole input.

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

_aten = torch.ops.aten
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
        self._inside_peak = 0

    @property
    def allocated_peak(self) -> int:
        return max(self._inside_peak, self.peak.total())

    def start_again(self) -> None:
        super().start_again()
        self._inside_peak = 0

    def _call(self, func: Any, args: Any, kwargs: Any) -> Any:
        self._follow_all((args, tuple(kwargs.values())), "activations")
        alive = self.live.total()
        if func.namespace in NAMESPACES:
            return func(*args, **kwargs)
        results, changes = self._changes(func, args, kwargs)
        self._inside_peak = max(self._inside_peak, *accumulate(changes, initial=alive))
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
    """LiveBytes of fake tensors; allocated_peak is about what CpuBytes would find, by the rules above."""

    def _changes(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, Iterable[int]]:
        alive = self.live.total()
        results = func(*args, **kwargs)
        inside = _inside_bytes(func, args, results)
        if not inside:
            return results, ()
        self._follow_all((results,), "activations")
        return results, [self.live.total() - alive + inside]


def _inside_bytes(func: Any, args: Any, results: Any) -> int:
    """Bytes of an operator's own temporaries, where a rule tells them."""
    if torch.Tag.pointwise in func.tags:
        return _converted_bytes(func, args, results)
    if func.overloadpacket is _aten.logsumexp:
        return args[0].numel() * args[0].itemsize
    if func.overloadpacket is _aten._scaled_dot_product_flash_attention_for_cpu:
        return _attention_bytes(*args[:3])
    if func.overloadpacket is _aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return _attention_backward_bytes(*args[:3])
    return 0


def _converted_bytes(func: Any, args: Any, results: Any) -> int:
    """Bytes of an elementwise operator's inputs and result in the dtype common to its inputs."""
    inputs = [arg for arg in args if isinstance(arg, Tensor) and arg.dtype != torch.bool]
    if len({t.dtype for t in inputs}) < 2 or func.overloadpacket is torch.ops.aten.copy_:
        return 0
    numbers = [arg for arg in args if isinstance(arg, Tensor) or type(arg) in (int, float)]
    _, common = elementwise_dtypes(*numbers, type_promotion_kind=ELEMENTWISE_TYPE_PROMOTION_KIND.DEFAULT)
    touched = [*inputs, results] if isinstance(results, Tensor) else inputs
    return sum(t.numel() * common.itemsize for t in touched if t.dtype not in (common, torch.bool))


def _block(q: Tensor, k: Tensor) -> tuple[int, int]:
    """Queries and keys of the block of scores that a thread computes at once."""
    queries = q.shape[2]
    return min(queries, 256 if queries >= 768 else 64 if queries >= 192 else 32), min(k.shape[2], 512)


def _attention_bytes(q: Tensor, k: Tensor, v: Tensor) -> int:
    """Scores, their maxima and sums, and outputs in fp32; in bf16 also scores.

    With AMX, in bf16, also keys and values repacked, and a block of them.

    Source: aten/src/ATen/native/cpu/FlashAttentionKernel.cpp, as is the backward's.
    """
    (rows, columns), d, threads = _block(q, k), q.shape[-1], torch.get_num_threads()
    buffers = 4 * threads * (rows * columns + 2 * rows + rows * d)
    if q.itemsize == 2:
        buffers += 2 * threads * rows * columns
        if torch.cpu._is_amx_tile_supported():
            buffers += 2 * (threads * columns * d + k.numel() + v.numel())
    return buffers


def _attention_backward_bytes(dout: Tensor, q: Tensor, k: Tensor) -> int:
    """Scores and their gradient, in fp32 and in bf16, and `dout` as [B, T, H, d]."""
    rows, columns = _block(q, k)
    scores = 2 * torch.get_num_threads() * rows * columns * (4 if q.itemsize == 4 else 4 + 2)
    return scores + (0 if dout.transpose(1, 2).is_contiguous() else dout.numel() * dout.itemsize)
