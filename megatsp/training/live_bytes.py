"""Bytes of tensors that are alive on this rank, and what they were at the peak.

Counted by dispatch: after every operation, the storages that exist and were seen. So it needs no
allocator that keeps books, works on a CPU, and tells weights from activations. What an operation
allocates and frees inside itself is not seen, nor is a storage that changes its size (as FSDP's do).
"""

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

KINDS = ("weights", "gradients", "optimizer", "other")


class LiveBytes(TorchDispatchMode):
    """Inside `with LiveBytes() as live:` every storage that an operation reads or gives is followed.

    live, peak: bytes by kind, now and when their sum was largest. "other" are activations and
    buffers: all that `hold` was not told of.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._known: dict[int, tuple[weakref.ref[torch.UntypedStorage], str, int]] = {}

    def hold(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Counts the storages of `tensors` as this kind, whatever they were before."""
        for tensor in tensors:
            self._follow(tensor, kind)
        self._note_peak()

    def hold_model(self, model: nn.Module) -> None:
        """Holds parameters as weights, and their gradients as such from when autograd has stored them."""
        for parameter in model.parameters():
            self.hold("weights", [parameter])
            parameter.register_post_accumulate_grad_hook(self._hold_gradient)

    def start_again(self) -> None:
        """Forgets the peak so far."""
        self.peak = Counter(self.live)

    def _hold_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self.hold("gradients", [parameter.grad])

    def _follow(self, tensor: Tensor, kind: str | None) -> None:
        if isinstance(tensor, DTensor):
            tensor = tensor._local_tensor
        if tensor.is_meta:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            reference, known_kind, size = self._known[key]
            if kind is not None and kind != known_kind:
                self.live[known_kind] -= size
                self.live[kind] += size
                self._known[key] = reference, kind, size
            return
        kind, size = kind or "other", storage.nbytes()
        self._known[key] = weakref.ref(storage, lambda _: self._forget(key)), kind, size
        self.live[kind] += size

    def _forget(self, key: int) -> None:
        _, kind, size = self._known.pop(key)
        self.live[kind] -= size

    def _note_peak(self) -> None:
        if self.live.total() > self.peak.total():
            self.peak = Counter(self.live)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, results)):
            if isinstance(leaf, Tensor):
                self._follow(leaf, None)
        self._note_peak()
        return results
