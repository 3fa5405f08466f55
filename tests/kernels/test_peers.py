"""Memory between ranks: its layout, what each rank sees of the others', and that nothing of it stays."""

import os
import signal
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed import run_distributed
from megatsp_kernels.peers import Layout, PeerError, Status, local, on_one_host, shared
from megatsp_kernels.peers.layout import LINE

CPU = torch.device("cpu")


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


def rank_shared() -> tuple[bool, list[bytes], list[str]]:
    rank, before = dist.get_rank(), set(os.listdir("/dev/shm"))
    memory = shared(4099)
    zero = not memory.local.any()
    dist.barrier()
    memory.local.fill_(10 + rank)
    dist.barrier()
    seen = [at(address + offset, 1) for address in memory.table.tolist() for offset in (0, 4098)]
    dist.barrier()
    memory.close()
    assert memory.local.numel() == 0
    return zero, seen, sorted(set(os.listdir("/dev/shm")) - before)


def test_ranks_read_each_others_memory_and_leave_nothing():
    for zero, seen, left in run_distributed(rank_shared, 3):
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
    before = set(os.listdir("/dev/shm"))
    with pytest.raises(AssertionError, match="rank 1 of 2 failed:\nit died"):
        run_distributed(rank_killed_with_memory, 2)
    assert set(os.listdir("/dev/shm")) <= before


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
    for message in run_distributed(rank_refused, 2, "no such door"):
        assert message == "shared memory cannot be made: rank 1: OSError: no such door"


def rank_host(names: list[str]) -> bool:
    import megatsp_kernels.peers.memory as module

    module.socket.gethostname = lambda: names[dist.get_rank()]  # type: ignore[assignment]
    return on_one_host()


@pytest.mark.parametrize(("names", "one"), [(["a", "a"], True), (["a", "b"], False)])
def test_hosts_are_compared(names, one):
    assert run_distributed(rank_host, 2, names) == [one, one]


def test_a_failed_wait_becomes_an_error_that_names_rank_and_flag():
    status = Status(CPU)
    status.check(1, 60)
    status.tensor.copy_(torch.tensor([1, 3, 17, 16]))
    message = "rank 1 waited 60 s for rank 3's flag 'slice of epoch 17': it is at 16"
    with pytest.raises(PeerError, match=message):
        status.check(1, 60)
