"""Memory between ranks: its layout, what each rank sees of the others', and that nothing of it stays."""

import os
import signal
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed import run_distributed
from megatsp_kernels.peers import (
    Layout,
    Memory,
    PeerError,
    Status,
    ipc,
    local,
    on_one_host,
    shared,
    symmetric,
)
from megatsp_kernels.peers.layout import LINE

CPU = torch.device("cpu")
Provider = Callable[[int, torch.device, dist.ProcessGroup], Memory]


@pytest.mark.parametrize("ranks", [1, 2, 8])
@pytest.mark.parametrize("pieces", [1, 3])
def test_nothing_overlaps(ranks, pieces):
    layout = Layout(ranks, pieces, slice_bytes=1000, gradient_bytes=2001)
    each = ranks * pieces
    regions = [
        (layout.ready, each * LINE), (layout.pulled, each * LINE),
        (layout.arrived, ranks * LINE), (layout.freed, ranks * LINE), (layout.failed, 4),
        (layout.slot(2), 1000), (layout.slot(1), 1000),
        *((layout.staging(2) + r * layout.source_bytes, 2001) for r in range(ranks)),
        *((layout.staging(1) + r * layout.source_bytes, 2001) for r in range(ranks)),
    ]  # fmt: skip
    for (start, length), (following, _) in pairwise(regions):
        assert start + length <= following
    start, length = regions[-1]
    assert start + length <= layout.num_bytes
    data = [layout.slot(0), layout.slot(1), layout.staging(0), layout.staging(1), layout.source_bytes]
    assert all(offset % 256 == 0 for offset in data)
    assert layout.slot(5) == layout.slot(3) and layout.staging(4) == layout.staging(2)


def test_simulated_peers_share_a_table():
    memories = local(1000, 3, CPU)
    for rank, memory in enumerate(memories):
        assert (memory.rank, memory.size) == (rank, 3)
        assert torch.equal(memory.table, memories[0].table)
        assert memory.table[rank] == memory.local.data_ptr()
        assert memory.local.shape == (1000,) and not memory.local.any()
        assert memory.local.data_ptr() % 256 == 0


def at(address: int, count: int) -> bytes:
    import ctypes

    return ctypes.string_at(address, count)


def named_memory() -> set[str]:
    """What this project has in /dev/shm; other tests' processes have theirs there meanwhile."""
    return {name for name in os.listdir("/dev/shm") if "megatsp" in name}


def rank_shared() -> tuple[bool, list[bytes], list[str]]:
    rank, before = dist.get_rank(), named_memory()
    memory = shared(4099)
    zero = not memory.local.any()
    dist.barrier()
    memory.local.fill_(10 + rank)
    dist.barrier()
    seen = [at(address + offset, 1) for address in memory.table.tolist() for offset in (0, 4098)]
    dist.barrier()
    memory.close()
    assert memory.local.numel() == 0
    return zero, seen, sorted(named_memory() - before)


def test_ranks_read_each_others_memory_and_leave_nothing():
    for zero, seen, left in run_distributed(rank_shared, 3, fresh=True):
        assert zero and not left
        assert seen == [bytes([10 + peer]) for peer in range(3) for _ in range(2)]


def rank_killed_with_memory() -> None:
    memory = shared(1 << 20)
    memory.local.fill_(1)
    dist.barrier()
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def test_a_killed_rank_leaves_nothing():
    before = named_memory()
    with pytest.raises(AssertionError, match="rank 1 of 2 failed:\nit died"):
        run_distributed(rank_killed_with_memory, 2, fresh=True)
    assert named_memory() <= before


def rank_refused(monkeypatched: str) -> str:
    if dist.get_rank() == 1:

        def refuse(*arguments, **named):
            raise OSError(monkeypatched)

        torch.UntypedStorage.from_file = refuse  # type: ignore[method-assign]
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(ValueError) as caught:
        shared(64)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    return str(caught.value)


def test_where_one_rank_cannot_open_it_all_say_why():
    for message in run_distributed(rank_refused, 2, "no such door", fresh=True):
        assert message == "shared memory cannot be made: rank 1: OSError: no such door"


def rank_host(hosts: list[tuple[str, str, str]]) -> bool:
    import megatsp_kernels.peers.memory as module

    def read(text: str) -> str:
        if not text:
            raise OSError("not readable")
        return text

    name, boot, namespace = hosts[dist.get_rank()]
    module.socket.gethostname = lambda: name  # type: ignore[assignment]
    module.Path.read_text = lambda path: read(boot)  # type: ignore[assignment, method-assign, misc]
    module.os.readlink = lambda path: read(namespace)  # type: ignore[assignment, misc]
    return on_one_host()


@pytest.mark.parametrize(
    ("other", "one"),
    [
        (("a", "boot 1", "pid:[1]"), True),
        (("b", "boot 1", "pid:[1]"), False),
        (("a", "boot 2", "pid:[1]"), False),
        (("a", "boot 1", "pid:[2]"), False),
        (("a", "", ""), False),
    ],
)
def test_hosts_are_compared(other, one):
    assert run_distributed(rank_host, 2, [("a", "boot 1", "pid:[1]"), other], fresh=True) == [one, one]


@pytest.mark.parametrize(("name", "one"), [("a", True), ("b", False)])
def test_hosts_that_cannot_be_read_are_compared_by_name(name, one):
    assert run_distributed(rank_host, 2, [("a", "", ""), (name, "", "")], fresh=True) == [one, one]


DEVICE = torch.device("cuda:3")  # only ever passed on: the stand-ins below are on the CPU


class StandIns:
    """Instead of what symmetric() and ipc() call of CUDA: files in memory, which the ranks open by number.

    calls: what was called, with what. addresses: where each rank's buffer begins here.
    """

    def __init__(self) -> None:
        import megatsp_kernels.peers.memory as module
        import torch.distributed._symmetric_memory as symmetric_memory

        self.rank, self.calls, self.addresses = dist.get_rank(), [], [0] * dist.get_world_size()
        symmetric_memory.empty = self.empty  # type: ignore[assignment]
        symmetric_memory.rendezvous = self.rendezvous  # type: ignore[assignment]
        torch.cuda.synchronize = lambda device: self.calls.append(("synchronize", device))  # type: ignore[assignment]
        module._zeros = self.zeros  # whose address is a multiple of 256 on GPUs
        torch.UntypedStorage._share_cuda_ = lambda storage: self.share(storage)  # type: ignore[assignment, method-assign]
        torch.UntypedStorage._new_shared_cuda = self.open_shared  # type: ignore[assignment, method-assign]

    def map(self, pid: int, fd: int, num_bytes: int, rank: int) -> torch.UntypedStorage:
        storage = torch.UntypedStorage.from_file(f"/proc/{pid}/fd/{fd}", shared=True, nbytes=num_bytes)
        self.addresses[rank] = storage.data_ptr()
        return storage

    def zeros(self, num_bytes: int, device: torch.device) -> torch.Tensor:
        self.fd = os.memfd_create("megatsp-stand-in")
        os.ftruncate(self.fd, num_bytes)
        self.calls.append(("allocate", device))
        return torch.empty(0, dtype=torch.uint8).set_(self.map(os.getpid(), self.fd, num_bytes, self.rank))

    def empty(self, num_bytes: int, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        assert dtype == torch.uint8
        return self.zeros(num_bytes, device).fill_(255)

    def rendezvous(self, tensor: torch.Tensor, group: dist.ProcessGroup) -> object:
        files = [(0, 0)] * len(self.addresses)
        dist.all_gather_object(files, (os.getpid(), self.fd), group)
        handle = type("Handle", (), {})()
        handle.peers = [
            self.map(*file, tensor.numel(), peer) for peer, file in enumerate(files) if peer != self.rank
        ]
        handle.buffer_ptrs = list(self.addresses)
        return handle

    def share(self, storage: torch.UntypedStorage) -> tuple:
        file = f"{os.getpid()} {self.fd} {self.rank}".encode()
        handle = (40 + self.rank, file, storage.nbytes(), 0, b"counter", self.rank, b"event", True)
        self.calls.append(("share", handle))
        return handle

    def open_shared(self, *handle) -> torch.UntypedStorage:
        self.calls.append(("open", handle))
        pid, fd, rank = map(int, handle[1].split())
        return self.map(pid, fd, handle[2], rank)


def mapped() -> bool:
    return "megatsp-stand-in" in Path("/proc/self/maps").read_text()


def rank_provider(make: Provider) -> list[tuple]:
    stand_ins = StandIns()
    assert dist.group.WORLD is not None
    memory = make(4099, DEVICE, dist.group.WORLD)
    rank = dist.get_rank()
    assert (memory.rank, memory.size) == (rank, 2)
    assert memory.table.dtype == torch.int64 and memory.table.tolist() == stand_ins.addresses
    assert memory.table[rank] == memory.local.data_ptr()
    assert memory.local.dtype == torch.uint8 and memory.local.shape == (4099,)
    # All zero as soon as it is made; no rank writes before the barrier.
    assert all(at(address, 4099) == bytes(4099) for address in memory.table.tolist())
    dist.barrier()
    memory.local.fill_(10 + rank)
    dist.barrier()
    assert [at(address + 4098, 1) for address in memory.table.tolist()] == [bytes([10]), bytes([11])]
    assert mapped()
    dist.barrier()
    memory.close()
    assert memory.local.numel() == 0 and not memory.table.any() and not mapped()
    return stand_ins.calls


def test_symmetric_memory_is_asked_for_on_the_device():
    for calls in run_distributed(rank_provider, 2, symmetric, fresh=True):
        assert calls == [("allocate", DEVICE), ("synchronize", DEVICE)]


def test_memory_between_processes_is_opened_on_the_device_by_the_peers_handle():
    first, second = run_distributed(rank_provider, 2, ipc, fresh=True)
    for own, other in [(first, second), (second, first)]:
        assert [name for name, _ in own] == ["allocate", "synchronize", "share", "open"]
        assert own[0][1] == own[1][1] == DEVICE
        assert own[3][1] == (3, *other[2][1][1:])


def rank_provider_fails(make: Provider, step: str) -> str:
    works = getattr(StandIns, step)

    def fail(*arguments, **named):
        works(*arguments, **named)  # a collective one must not leave the other rank waiting
        raise RuntimeError("no such door\nand more")

    if dist.get_rank() == 1:
        setattr(StandIns, step, fail)
    StandIns()
    assert dist.group.WORLD is not None
    with pytest.raises(ValueError) as caught:
        make(64, DEVICE, dist.group.WORLD)
    return str(caught.value)


@pytest.mark.parametrize(
    ("make", "step", "what"),
    [
        (symmetric, "empty", "symmetric memory"),
        (symmetric, "rendezvous", "symmetric memory"),
        (ipc, "share", "memory between processes"),
        (ipc, "open_shared", "memory between processes"),
    ],
)
def test_where_one_rank_has_no_gpu_memory_all_say_why(make, step, what):
    for message in run_distributed(rank_provider_fails, 2, make, step, fresh=True):
        assert message == f"{what} cannot be made: rank 1: RuntimeError: no such door"


def test_a_failed_wait_becomes_an_error_that_names_rank_and_flag():
    status = Status(CPU)
    status.check(1, 60)
    status.tensor.copy_(torch.tensor([1, 3, 17, 16]))
    message = "rank 1 waited 60 s for rank 3's flag 'slice of epoch 17': it is at 16"
    with pytest.raises(PeerError, match=message):
        status.check(1, 60)
