"""Ranks write and read one checkpoint together: all know of one's failure, and what was there stays."""

import errno
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed import run_distributed
from runs import files
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from megatsp.checkpoint import agree, manifest, paths, storage
from megatsp.checkpoint.manifest import Damaged
from megatsp.checkpoint.state import RunState
from megatsp.checkpoint.store import load, write
from megatsp.hf import safetensors_file

WHOLE = torch.arange(7 * 3, dtype=torch.float32).view(7, 3)
SHARDS = [f"shard-0000{i}-of-00002.safetensors" for i in (1, 2)]


def sharded(value: Tensor) -> dict[str, Tensor]:
    """Rows 0-3 on rank 0, 4-6 on rank 1; one of its tensors has no part on rank 1."""
    mesh = init_device_mesh("cpu", (2,))
    return {
        "optimizer.rows": distribute_tensor(value, mesh, [Shard(0)]),
        "optimizer.one": distribute_tensor(value[:1], mesh, [Shard(0)]),
        "optimizer.same": value.clone(),
    }


def refuse(kind: int, only: int) -> object:
    """Writing a tensor fails on one rank."""
    before = safetensors_file.TensorWriter.write

    def write(self: object, name: str, tensor: Tensor) -> None:
        if dist.get_rank() == only:
            raise OSError(kind, "no")
        before(self, name, tensor)  # type: ignore[arg-type]

    return write


def fail_in_turn(folder: Path) -> None:
    """On a rank: saves that fail here or there, after one that succeeded."""
    state = RunState(iteration=1)
    written = write(folder, state, sharded(WHOLE), {"config.yaml": b"first"}, None)
    before = files(folder) if dist.get_rank() == 0 else {}
    assert written.bytes == sum(
        p.stat().st_size for p in written.folder.iterdir() if p.name != manifest.MANIFEST
    )
    patch = pytest.MonkeyPatch()
    for kind, reason in ((errno.ENOSPC, "the disk is full"), (errno.EROFS, "no")):
        for rank in (0, 1):
            with patch.context() as patched:
                patched.setattr(safetensors_file.TensorWriter, "write", refuse(kind, rank))
                with pytest.raises(ValueError, match=f"rank {rank}: cannot write .*{SHARDS[rank]}: {reason}"):
                    write(folder, state, sharded(-WHOLE), {"config.yaml": b"second"}, None)
            assert dist.get_rank() != 0 or files(folder) == before

    # The pointer cannot be moved: the old checkpoint is put back.
    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "no")

    with patch.context() as patched:
        patched.setattr(paths, "replace_text", full)
        with pytest.raises(ValueError, match="cannot write .*iter_0000001: the disk is full"):
            write(folder, state, sharded(-WHOLE), {"config.yaml": b"second"}, None)
    assert dist.get_rank() != 0 or files(folder) == before
    with pytest.raises(ValueError, match="optimizer.odd is of type torch.int64; a checkpoint holds"):
        write(folder, state, {"optimizer.odd": torch.arange(2)}, {}, None)
    (folder / "file").write_text("")
    with pytest.raises(ValueError, match="rank 0: cannot write .*file/iter_0000001.tmp: "):
        write(folder / "file", state, sharded(WHOLE), {}, None)
    # At last: the older one of the iteration is replaced.
    written = write(folder, state, sharded(-WHOLE), {"config.yaml": b"second"}, None)
    assert (written.folder / "config.yaml").read_bytes() == b"second"
    dist.barrier()
    assert sorted(p.name for p in folder.glob("iter_*")) == ["iter_0000001"]


def read_together(folder: Path) -> None:
    """On a rank: what is whole, and what is damaged in the part that only one rank reads through."""
    empty, own = nn.Module(), sharded(torch.zeros(7, 3))
    load(folder, empty, own)
    assert torch.equal(own["optimizer.rows"].full_tensor(), -WHOLE)  # type: ignore[attr-defined]
    assert torch.equal(own["optimizer.same"], -WHOLE)
    opened: list[str] = []
    reads = storage.read_header
    storage.read_header = lambda path: (opened.append(path.name), reads(path))[1]  # type: ignore[func-returns-value]
    load(folder, empty, own)
    storage.read_header = reads
    assert opened == [SHARDS[dist.get_rank()]]  # a header is read once by the job
    for name in SHARDS:
        content = (folder / name).read_bytes()
        dist.barrier()
        if dist.get_rank() == 0:
            (folder / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        dist.barrier()
        with pytest.raises(Damaged, match=f"{name} has checksum"):
            load(folder, empty, own)
        load(folder, empty, own, verify="sizes")
        dist.barrier()
        if dist.get_rank() == 0:
            (folder / name).write_bytes(content)
        dist.barrier()

    def unlucky() -> None:
        if dist.get_rank() == 1:
            raise KeyError("a bug")

    with pytest.raises(RuntimeError, match="rank 1: KeyError: 'a bug'"):
        agree.on_each(unlucky)


def write_then_read(folder: Path) -> None:
    fail_in_turn(folder)
    read_together(paths.folder_of(folder, 1))


def test_all_ranks_agree_on_what_one_finds(tmp_path):
    run_distributed(write_then_read, 2, tmp_path)
