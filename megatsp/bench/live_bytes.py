"""Bytes of tensors that are alive on this rank, what they were at the peak, and bytes that moved.

Counted by dispatch: after every operation, the storages that exist and were seen. So it needs no
allocator that keeps books, works on a CPU, on a GPU and on fake tensors, and tells weights from
activations. What an operation allocates and frees inside itself is not seen.
"""

import threading
import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatsp.bench.collectives import NAMESPACES, moved_bytes

KINDS = ("weights", "gradients", "optimizer", "activations", "communication")
_HELD = frozenset(KINDS[:3])


class _Followed:
    """What is known of one storage."""

    __slots__ = ("kind", "reference", "size")

    def __init__(self, reference: "weakref.ref[torch.UntypedStorage]", kind: str, size: int) -> None:
        self.reference, self.kind, self.size = reference, kind, size


class LiveBytes(TorchDispatchMode):
    """Inside `with LiveBytes() as live:` every storage that an operation reads or gives is followed.

    weights, gradients, optimizer: as `hold` was told. communication: what a collective has read or
    written, and FSDP2's gathered parameters, whose storages it empties and fills again. activations:
    all else; a gradient too until autograd has stored it in its parameter.

    live, peak: bytes by kind, now and when their sum was largest. moved: bytes by collective.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.moved: Counter[str] = Counter()
        self._total = self._peak_total = 0
        self._known: dict[int, _Followed] = {}
        # gloo's threads let go of tensors too. Re-entrant, as any thread may while it counts.
        self._lock = threading.RLock()
        self._thread = threading.get_ident()

    def hold(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Counts the storages of `tensors` as this kind, whatever they were before."""
        for tensor in tensors:
            self._follow(tensor, kind)
        self._note_peak()

    def hold_model(self, model: nn.Module) -> None:
        """Holds parameters as weights, and their gradients as such from when autograd has stored them."""
        for parameter in model.parameters():
            self.hold("weights", [parameter])
            if parameter.requires_grad:  # not frozen beside adapters
                parameter.register_post_accumulate_grad_hook(self._hold_gradient)

    def start_again(self) -> None:
        """Forgets the peak so far, and what has moved."""
        self.peak, self._peak_total = Counter(self.live), self._total
        self.moved.clear()

    def __enter__(self) -> "LiveBytes":
        # Dispatch does not see a storage that changes its size, as FSDP2's gathered parameters do.
        storages: Any = torch.UntypedStorage
        original = storages.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            result = original(storage, size)
            self._follow_storage(storage, "communication")
            self._note_peak()
            return result

        storages.resize_ = resize_
        self._original_resize = original
        self._thread = threading.get_ident()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        storages: Any = torch.UntypedStorage
        storages.resize_ = self._original_resize

    def _hold_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self.hold("gradients", [parameter.grad])

    def _follow(self, tensor: Tensor, kind: str) -> None:
        if isinstance(tensor, DTensor):
            tensor = tensor._local_tensor
        if tensor.device.type != "meta":
            self._follow_storage(tensor.untyped_storage(), kind)

    def _follow_storage(self, storage: torch.UntypedStorage, kind: str) -> None:
        key, size = storage._cdata, storage.nbytes()
        with self._lock:
            known = self._known.get(key)
            if known is None:
                known = _Followed(weakref.ref(storage, lambda _: self._forget(key)), kind, 0)
                self._known[key] = known
            # A collective makes a communication buffer of what is not held; other use changes nothing.
            if kind == "activations" or (kind == "communication" and known.kind in _HELD):
                kind = known.kind
            if kind != known.kind or size != known.size:
                self.live[known.kind] -= known.size
                self.live[kind] += size
                self._total += size - known.size
                known.kind, known.size = kind, size

    def _forget(self, key: int) -> None:
        with self._lock:
            known = self._known.pop(key)
            self.live[known.kind] -= known.size
            self._total -= known.size

    def _note_peak(self) -> None:
        if self._total > self._peak_total:
            self.peak, self._peak_total = Counter(self.live), self._total

    def _follow_all(self, tree: Any, kind: str) -> None:
        for leaf in tree:
            if isinstance(leaf, Tensor):
                self._follow(leaf, kind)
            elif isinstance(leaf, (list, tuple)):
                self._follow_all(leaf, kind)

    def _call(self, func: Any, args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, (DTensor, AsyncCollectiveTensor)) for t in types):
            return NotImplemented  # they dispatch what they do with their local tensor, which comes here
        if threading.get_ident() != self._thread and torch._C._current_graph_task_id() == -1:
            return func(*args, **(kwargs or {}))  # neither the step's nor autograd's: gloo's own work
        results = self._call(func, args, kwargs or {})
        kind = "activations"
        if func.namespace in NAMESPACES:
            kind = "communication"
            name, moved = moved_bytes(func, args, results)
            if name:
                self.moved[name] += moved
        self._follow_all((args, results), kind)
        if kwargs:
            self._follow_all(kwargs.values(), kind)
        self._note_peak()
        return results
