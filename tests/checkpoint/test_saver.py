"""Saves beside training: what is saved, when, and what becomes of those that fail."""

import os
import resource
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from distributed import run_distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from waiting import LIMIT_S, wait_until

from megatsp.checkpoint import paths, saver, store
from megatsp.checkpoint.manifest import check_files
from megatsp.checkpoint.saver import Failed, Saved, Saver
from megatsp.checkpoint.staging import Staging
from megatsp.checkpoint.state import RunState
from megatsp.schema import CheckpointConfig

SIZES = {"matrix": (7, 5), "columns": (3, 6), "copied": (5, 2), "plain": (9,), "scalar": ()}


def values(iteration: int) -> dict[str, Tensor]:
    """Logical tensors that differ between iterations."""
    generator = torch.Generator().manual_seed(iteration)
    return {name: torch.randn(size, generator=generator) for name, size in SIZES.items()}


def sharded(iteration: int) -> dict[str, Tensor]:
    """The same on a mesh of all ranks."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    placements = {"matrix": Shard(0), "columns": Shard(1), "copied": Replicate()}
    return {
        name: distribute_tensor(tensor, mesh, [placements[name]]) if name in placements else tensor
        for name, tensor in values(iteration).items()
    }


def train(tensors: dict[str, Tensor], iteration: int) -> None:
    """Changes tensors in place to what they are at another iteration."""
    for tensor, new in zip(tensors.values(), sharded(iteration).values(), strict=True):
        tensor.copy_(new)


def check(checkpoints: Path, iteration: int) -> None:
    """A checkpoint is whole and holds what was there at its iteration; in one process."""
    folder = paths.folder_of(checkpoints, iteration)
    manifest = check_files(folder, "checksums")
    found = {name: torch.zeros(entry.shape) for name, entry in manifest.tensors.items()}
    store.fill(folder, manifest, found)
    assert store.read_state(folder).iteration == iteration
    for name, expected in values(iteration).items():
        assert torch.equal(found[name], expected), name


def state(iteration: int) -> RunState:
    return RunState(iteration=iteration)


def news(of: Saver, count: int) -> list[Saved | Failed]:
    """The next so many outcomes, once they are there."""
    found: list[Saved | Failed] = []

    def are_there() -> bool:
        if (outcome := of.collect()) is not None:
            found.append(outcome)
        return len(found) == count

    wait_until(are_there, lambda: f"{count} outcomes, beside {found}", pause_s=0.002)
    return found


@contextmanager
def small_files(on_rank: int):
    """On this rank no file grows beyond a few bytes: the system refuses, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == on_rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, before[1]))
    dist.barrier()
    try:
        yield
    finally:
        dist.barrier()
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def held_writes(monkeypatch):
    """Every write waits for the event."""
    release, write = threading.Event(), store.write

    def wait_and_write(*given):
        assert release.wait(LIMIT_S)
        return write(*given)

    monkeypatch.setattr(saver.store, "write", wait_and_write)
    yield release
    monkeypatch.undo()


class TwoLinear(nn.Module):
    def __init__(self, mesh) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.rows = nn.Parameter(distribute_tensor(torch.randn(9, 4), mesh["tsp"], [Shard(0)]))
        self.columns = nn.Parameter(distribute_tensor(torch.randn(4, 6), mesh["tsp"], [Shard(1)]))
        self.gain = nn.Parameter(distribute_tensor(torch.randn(8), mesh["tsp"], [Replicate()]))


def _stage(folder: Path) -> tuple[int, int, dict[str, Tensor]]:
    """Saves parameters of FSDP2 and HSDP over a tsp axis; returns bytes copied and what was saved."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tsp"))
    model = TwoLinear(mesh)
    fully_shard(model, mesh=mesh["dp"])
    strided = model.rows.placements
    assert "Strided" in str(strided), strided
    cube = init_device_mesh("cpu", (2, 2, 1), mesh_dim_names=("copies", "rows", "one"))
    whole = torch.arange(77.0).view(11, 7)
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    tensors["hybrid"] = distribute_tensor(whole, cube, [Replicate(), Shard(0), Shard(1)])
    tensors["half"] = distribute_tensor(whole.bfloat16(), cube, [Shard(0), Replicate(), Replicate()])
    tensors["turned"] = distribute_tensor(whole, cube, [Shard(0), Shard(1), Replicate()]).t()
    tensors["plain"], tensors["other"] = whole[::2, ::3], torch.tensor(2.5)
    local = torch.ones(2, 3) * dist.get_rank()
    tensors["wrapped"] = DTensor.from_local(local, cube, [Shard(0), Shard(1), Replicate()], run_check=False)
    expected = {
        name: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for name, t in tensors.items()
    }
    staging = Staging()
    copies = staging.copy(tensors)
    for tensor in tensors.values():
        tensor.fill_(float("nan"))  # training goes on
    parts = [copy.part for copy in copies.values() if copy.part is not None]
    begins = {part.untyped_storage().data_ptr() for part in parts}
    store.write(folder, state(1), dict(copies), {}, None)
    again = [copy.part for copy in staging.copy(tensors).values() if copy.part is not None]
    assert {part.untyped_storage().data_ptr() for part in again} == begins, "a new buffer"
    total = sum(tensor.nbytes for tensor in expected.values())
    return sum(part.nbytes for part in parts), total, expected


def test_copies_of_any_placement_each_by_one_rank(tmp_path):
    results = run_distributed(_stage, 4, tmp_path)
    _, total, expected = results[0]
    copied = [num_bytes for num_bytes, _, _ in results]
    assert sum(copied) == total
    assert max(copied) < 0.5 * total  # equal parts are spread over those who hold them
    manifest = check_files(paths.folder_of(tmp_path, 1))
    found = {
        name: torch.zeros(entry.shape, dtype=expected[name].dtype) for name, entry in manifest.tensors.items()
    }
    store.fill(paths.folder_of(tmp_path, 1), manifest, found)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def _stage_from_gpu() -> None:
    tensors = {
        "matrix": torch.randn(1000, 999, device="cuda"),
        "turned": torch.randn(3, 4, device="cuda").t(),
    }
    expected = {name: tensor.cpu() for name, tensor in tensors.items()}
    staging = Staging()
    for _ in range(2):
        copies = staging.copy(tensors)
        for name, tensor in expected.items():
            part = copies[name].part
            assert part is not None and part.is_pinned() and torch.equal(part, tensor)
    staging.close()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_copies_from_a_gpu_are_pinned():
    run_distributed(_stage_from_gpu, 1)


def _go_on(folder: Path) -> None:
    """Trains while it saves; one is in flight, old ones go, BEST moves; then the same in the foreground."""
    monkeypatch, clock, looks = pytest.MonkeyPatch(), [5.0], []
    real = saver.time
    monkeypatch.setattr(
        saver, "time", SimpleNamespace(perf_counter=lambda: clock[0], monotonic=real.monotonic)
    )
    with held_writes(pytest.MonkeyPatch()) as release:

        def look() -> None:
            """While the second save waits for the first, which takes a while."""
            assert not of.finished
            looks.append(clock[0])
            clock[0] += 0.25
            release.set()

        of = Saver(folder, CheckpointConfig(keep_last=2), beat=look)
        tensors = sharded(1)
        of.save(state(1), tensors, {"config.yaml": b"a"}, None, best=1)
        train(tensors, 2)
        assert not of.finished and of.collect() is None
        assert not looks
        of.save(state(2), tensors, {"config.yaml": b"b"}, None, best=1)
        assert looks and of.finished  # the first has gone before the second is copied
        stall_ms = 1e3 * (clock[0] - looks[0])
    monkeypatch.undo()
    train(tensors, 3)
    first, second = news(of, 2)
    assert isinstance(first, Saved) and isinstance(second, Saved)
    assert (first.iteration, second.iteration) == (1, 2)
    assert second.stall_ms >= stall_ms >= 250 and second.folder == paths.folder_of(folder, 2)
    assert second.bytes == sum(path.stat().st_size for path in second.folder.rglob("*") if path.is_file()) - (
        (second.folder / "manifest.json").stat().st_size
    )
    for iteration in (3, 4):
        train(tensors, iteration)
        of.save(state(iteration), tensors, {}, None)
    train(tensors, 9)
    last = of.close()
    assert isinstance(last, Saved) and last.iteration == 4 and not last.problem
    assert [outcome.iteration for outcome in news(of, 1)] == [3]
    assert not [thread for thread in threading.enumerate() if thread.name == "checkpoint"]
    # The same numbers in the foreground.
    of = Saver(folder.with_name("foreground"), CheckpointConfig(async_save=False))
    train(tensors, 4)
    of.save(state(4), tensors, {}, None)
    assert of.finished
    assert isinstance(of.collect(), Saved) and of.close() is None


def test_training_goes_on_while_one_save_is_written(tmp_path):
    background, foreground = tmp_path / "background", tmp_path / "foreground"
    run_distributed(_go_on, 2, background)
    assert sorted(path.name for path in background.glob("iter_*")) == [
        "iter_0000001", "iter_0000003", "iter_0000004",
    ]  # fmt: skip
    assert paths.best(background) == paths.folder_of(background, 1)
    for iteration in (1, 3, 4):
        check(background, iteration)
    check(foreground, 4)
    files = sorted(path.name for path in (foreground / "iter_0000004").glob("*.safetensors"))
    assert len(files) == 2
    for name in files:
        one, other = (folder / "iter_0000004" / name for folder in (background, foreground))
        assert one.read_bytes() == other.read_bytes()


def _fail(folder: Path) -> list[tuple[int, str, float | None]]:
    """Saves on a rank that cannot write; returns the failures as this rank was told them."""
    told: list[Failed] = []

    def failed(of: Saver, count: int) -> None:
        found = news(of, count)
        assert all(isinstance(outcome, Failed) for outcome in found), found
        told.extend(outcome for outcome in found if isinstance(outcome, Failed))

    tensors = sharded(1)
    of = Saver(folder, CheckpointConfig(), retry_s=0.1)
    of.save(state(1), tensors, {}, None)
    assert isinstance(news(of, 1)[0], Saved)
    with small_files(on_rank=1):
        train(tensors, 2)
        of.save(state(2), tensors, {}, None)
        train(tensors, 3)
        failed(of, 2)
        assert paths.latest(folder) == paths.folder_of(folder, 1)
        assert paths.iterations(folder) == [1]
    while isinstance(outcome := news(of, 1)[0], Failed):
        pass  # the attempt after the limit was lifted comes by itself
    assert outcome.iteration == 2 and of.close() is None
    check(folder, 2)
    # A newer one takes the place of one that fails.
    of = Saver(folder, CheckpointConfig(), retry_s=60)
    with small_files(on_rank=0):
        of.save(state(3), tensors, {}, None)
        failed(of, 1)
    train(tensors, 4)
    of.save(state(4), tensors, {}, None)
    failed(of, 1)
    assert isinstance(of.close(), Saved)
    # The last attempt, which works; and one, in the foreground first, which does not.
    of = Saver(folder, CheckpointConfig(), retry_s=60)
    with small_files(on_rank=1):
        train(tensors, 5)
        of.save(state(5), tensors, {}, None)
        train(tensors, 6)
        failed(of, 1)
    last = of.close()
    assert isinstance(last, Saved) and last.iteration == 5
    of = Saver(folder, CheckpointConfig(async_save=False), retry_s=60)
    with small_files(on_rank=1):
        of.save(state(6), tensors, {}, None)
        train(tensors, 7)
        failed(of, 1)
        last = of.close()
        assert isinstance(last, Failed)
        told.append(last)
    of = Saver(folder, CheckpointConfig(async_save=False), retry_s=0.01)
    with small_files(on_rank=1):
        of.save(state(7), tensors, {}, None)
        failed(of, 1)
    train(tensors, 8)
    while isinstance(outcome := news(of, 1)[0], Failed):
        pass
    assert outcome.iteration == 7
    of.close()
    return [(failure.iteration, failure.reason, failure.retry_s) for failure in told]


def test_what_one_rank_cannot_write_is_told_to_all_and_written_again(tmp_path):
    first, second = run_distributed(_fail, 2, tmp_path)
    assert first == second
    assert [(iteration, retry_s) for iteration, _, retry_s in first] == [
        (2, 0.1), (2, 0.2), (3, 60), (3, None), (5, 60), (6, 60), (6, None), (7, 0.01),
    ]  # fmt: skip
    assert "rank 1: cannot write" in first[0][1] and "File too large" in first[0][1]
    assert "rank 0: cannot write" in first[2][1]
    assert "a newer one takes its place" in first[3][1]
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == [
        f"iter_000000{n}" for n in (1, 2, 4, 5, 7)
    ]
    for iteration in (1, 2, 4, 5, 7):
        check(tmp_path, iteration)


def _die(folder: Path) -> None:
    of = Saver(folder, CheckpointConfig())
    of.save(state(1), sharded(1), {}, None)
    assert isinstance(news(of, 1)[0], Saved)
    if dist.get_rank() == 1:
        fsync = os.fsync
        os.fsync = lambda descriptor: fsync(descriptor) or os.kill(os.getpid(), signal.SIGKILL)
    of.save(state(2), sharded(2), {}, None)
    news(of, 1)


def test_a_rank_that_dies_in_the_middle_leaves_no_checkpoint(tmp_path):
    with pytest.raises(AssertionError, match="rank 1 of 2 failed:\nit died with exit code -9"):
        run_distributed(_die, 2, tmp_path)
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == ["iter_0000001", "iter_0000002.tmp"]
    assert paths.latest(tmp_path) == paths.folder_of(tmp_path, 1)
    check(tmp_path, 1)


ENDING = """
import resource, sys
import torch.distributed as dist
from pathlib import Path
from megatsp.checkpoint.saver import Failed, Saver
from megatsp.schema import CheckpointConfig
sys.path.insert(0, {tests!r})
from test_saver import news, sharded, state

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
of = Saver(Path(sys.argv[1]), CheckpointConfig(), retry_s=10_000)
of.save(state(1), sharded(1), {{}}, None)
news(of, 1)
resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
of.save(state(2), sharded(2), {{}}, None)
assert isinstance(news(of, 1)[0], Failed)
"""


def test_a_program_that_ends_without_closing_waits_for_no_retry(tmp_path):
    program = ENDING.format(tests=str(Path(__file__).parent))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], env=environment, capture_output=True, text=True,
        timeout=LIMIT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.glob("iter_*")] == ["iter_0000001"]
    check(tmp_path, 1)


@pytest.mark.parametrize("grows", [True, False])
def test_waiting_for_a_save_is_progress_while_its_files_grow(tmp_path, grows):
    beats: list[None] = []
    saver = Saver.__new__(Saver)  # what waits needs no group
    saver._checkpoints, saver._asked, saver._error = tmp_path, threading.Event(), None
    saver._beat = lambda: beats.append(None)
    (tmp_path / "iter_0000001.tmp").mkdir()

    def write() -> None:
        with (tmp_path / "iter_0000001.tmp" / "shard").open("ab", buffering=0) as file:
            while len(beats) < 3 if grows else len(looks) < 5:
                file.write(b"x" if grows else b"")

    looks: list[int] = []
    count = saver._written
    saver._written = lambda: looks.append(count()) or looks[-1]
    saver._thread = threading.Thread(target=write)
    saver._thread.start()
    saver._wait()
    assert len(beats) >= 3 if grows else len(beats) == 1  # when it began to look


def test_a_save_may_end_while_its_files_are_counted(tmp_path):
    saver = Saver.__new__(Saver)
    saver._checkpoints = tmp_path
    temporary, whole, stopped = tmp_path / "iter_0000001.tmp", tmp_path / "iter_0000001", threading.Event()
    temporary.mkdir()
    (temporary / "shard").write_bytes(b"1234")

    def rename() -> None:
        while not stopped.is_set():
            temporary.rename(whole)
            whole.rename(temporary)

    thread = threading.Thread(target=rename)
    thread.start()
    try:
        counted = {saver._written() for _ in range(2_000)}
    finally:
        stopped.set()
        thread.join()
    assert counted <= {0, 4} and saver._written() == 4
