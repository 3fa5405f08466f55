"""Memory that every rank of a group addresses: one buffer a rank, and a table of their addresses."""

import os
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Memory(Protocol):
    """A group's buffers, of one size, as this process addresses them; zero at first.

    rank: of this process in the group. size: ranks. table: int64 [size], on the device: where each
    rank's buffer begins. local: this rank's own, uint8.
    """

    rank: int
    size: int
    table: Tensor
    local: Tensor

    def close(self) -> None:
        """Lets go of all buffers. No rank may use them any more."""


class _Memory:
    def __init__(self, rank: int, addresses: Sequence[int], local: Tensor, keep: Sequence[Any] = ()) -> None:
        assert all(address % 256 == 0 for address in addresses)
        self.rank, self.size, self.local = rank, len(addresses), local
        self.table = torch.tensor(addresses, dtype=torch.int64, device=local.device)
        self._keep = list(keep)

    def close(self) -> None:
        self.local = self.local.new_empty(0)
        self.table = torch.zeros_like(self.table)
        self._keep.clear()


def local(num_bytes: int, ranks: int, device: torch.device) -> list[Memory]:
    """As many ranks' buffers in this one process, for tests and measurements; one `Memory` each."""
    buffers = [_zeros(num_bytes, device) for _ in range(ranks)]
    addresses = [b.data_ptr() for b in buffers]
    return [_Memory(rank, addresses, buffers[rank], buffers) for rank in range(ranks)]


def shared(num_bytes: int, group: dist.ProcessGroup | None = None) -> Memory:
    """CPU ranks of one machine share memory. It has no name, so that nothing is left of a killed rank.

    Raises:
        ValueError: a rank cannot open another one's memory; the same on every rank.
    """
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    own = os.memfd_create(f"megatsp-{rank}")
    os.ftruncate(own, num_bytes)

    files = _gather((os.getpid(), own), ranks, group)

    def open_all() -> list[Any]:
        return [
            torch.UntypedStorage.from_file(f"/proc/{pid}/fd/{fd}", shared=True, nbytes=num_bytes)
            for pid, fd in files
        ]

    try:
        storages = _together(open_all, "shared memory", ranks, group)
    finally:
        os.close(own)
    tensor = torch.empty(0, dtype=torch.uint8).set_(storages[rank])
    return _Memory(rank, [s.data_ptr() for s in storages], tensor, storages)


def symmetric(num_bytes: int, device: torch.device, group: dist.ProcessGroup) -> Memory:
    """GPUs of one machine, by torch's symmetric memory.

    Raises:
        ValueError: torch cannot make it here; the same on every rank.
    """
    import torch.distributed._symmetric_memory as symmetric_memory

    rank, ranks = dist.get_rank(group), dist.get_world_size(group)

    def make() -> Tensor:
        return symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=device).zero_()

    what = "symmetric memory"
    tensor = _together(make, what, ranks, group)
    handle = _together(lambda: symmetric_memory.rendezvous(tensor, group), what, ranks, group)
    torch.cuda.synchronize(device)
    dist.barrier(group)  # every buffer is zero
    return _Memory(rank, handle.buffer_ptrs, tensor, [handle])


def ipc(num_bytes: int, device: torch.device, group: dist.ProcessGroup) -> Memory:
    """GPUs of one machine, by the handles that CUDA and HIP give out for memory between processes.

    Raises:
        ValueError: a rank cannot open another one's memory; the same on every rank.
    """
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    tensor = _zeros(num_bytes, device)
    torch.cuda.synchronize(device)

    what, storage = "memory between processes", tensor.untyped_storage()
    handle = _together(storage._share_cuda_, what, ranks, group)
    handles = _gather(handle[1:], ranks, group)  # plain bytes and numbers; [0] is the owner's device

    def open_all() -> list[torch.UntypedStorage]:
        # Opened on this device, so that it is this one that gets access.
        return [
            storage if peer == rank else torch.UntypedStorage._new_shared_cuda(device.index or 0, *handle)
            for peer, handle in enumerate(handles)
        ]

    storages = _together(open_all, what, ranks, group)
    dist.barrier(group)
    return _Memory(rank, [s.data_ptr() for s in storages], tensor, storages)


def on_one_host(group: dist.ProcessGroup | None = None) -> bool:
    """Whether all ranks of the group run on one machine, in one container; the same on every rank."""
    return len(set(_gather(_host(), dist.get_world_size(group), group))) == 1


def _host() -> tuple[str, ...]:
    """Hostnames repeat, and a process's number names another process in another container."""
    boot = namespace = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    with suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    return socket.gethostname(), boot, namespace


def _zeros(num_bytes: int, device: torch.device) -> Tensor:
    """At an address that is a multiple of 256."""
    tensor = torch.zeros(num_bytes + 256, dtype=torch.uint8, device=device)
    start = -tensor.data_ptr() % 256
    return tensor[start : start + num_bytes]


def _gather(value: Any, ranks: int, group: dist.ProcessGroup | None) -> list[Any]:
    values: list[Any] = [None] * ranks
    dist.all_gather_object(values, value, group)
    return values


def _together(make: Callable[[], Any], what: str, ranks: int, group: dist.ProcessGroup | None) -> Any:
    """make(), which every rank must manage: where one cannot, all raise, and say why."""
    result, error = None, ""
    try:
        result = make()
    except (RuntimeError, OSError, ImportError, AttributeError) as caught:
        error = f"{type(caught).__name__}: {caught}".splitlines()[0]
    errors = _gather(error, ranks, group)
    for rank, text in enumerate(errors):
        if text:
            raise ValueError(f"{what} cannot be made: rank {rank}: {text}")
    return result
