"""What is kept of a run's checkpoints, what is removed, and that half of one never looks whole."""

import errno
import shutil
from pathlib import Path

import pytest

from megatsp.checkpoint import paths, retention
from megatsp.checkpoint.manifest import MANIFEST, Manifest, entry_of, write_manifest
from megatsp.checkpoint.retention import is_good, retain
from megatsp.checkpoint.state import RunState, state_to_json
from megatsp.checkpoint.store import write_files
from megatsp.ckpt.prune import prune

SHARD = "shard-00001-of-00001.safetensors"


@pytest.fixture
def checkpoints(tmp_path) -> Path:
    """Whole checkpoints of 10, 20, ... 60; the pointer names the last."""
    for iteration in range(10, 70, 10):
        make(tmp_path, iteration)
    (tmp_path / paths.LATEST).write_text("60\n")
    return tmp_path


def make(checkpoints: Path, iteration: int) -> Path:
    folder = paths.folder_of(checkpoints, iteration)
    (folder / "tokenizer").mkdir(parents=True)
    (folder / SHARD).write_bytes(bytes(100))
    (folder / "tokenizer" / "tokenizer.json").write_bytes(b"{}")
    files = {SHARD: entry_of(bytes(100)), "tokenizer/tokenizer.json": entry_of(b"{}")}
    write_manifest(folder, Manifest(files, {}))
    return folder


def left(checkpoints: Path) -> list[int]:
    folders = [path for path in checkpoints.iterdir() if path.is_dir()]
    found = sorted(int(path.name.removeprefix("iter_")) for path in folders)
    assert all(is_good(paths.folder_of(checkpoints, iteration)) for iteration in found)
    return found


def retained(checkpoints: Path, *given, **options) -> list[int]:
    """What is left; a dry run foretells what is removed, and removes nothing."""
    before = {path: path.stat().st_mtime_ns for path in checkpoints.rglob("*")}
    told = retain(checkpoints, *given, **options, dry_run=True)
    assert {path: path.stat().st_mtime_ns for path in checkpoints.rglob("*")} == before
    assert retain(checkpoints, *given, **options) == told == sorted(told)
    assert not any(folder.exists() for folder in told)
    return left(checkpoints)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((0,), [10, 20, 30, 40, 50, 60]),  # keeps all
        ((0, 40), [10, 20, 30, 40, 50, 60]),
        ((1,), [60]),
        ((2,), [50, 60]),
        ((6,), [10, 20, 30, 40, 50, 60]),
        ((7,), [10, 20, 30, 40, 50, 60]),
        ((2, 20), [20, 40, 50, 60]),
        ((1, 25), [50, 60]),
        ((1, 0, {10, 30}), [10, 30, 60]),
        ((1, 40, {10, 70}), [10, 40, 60]),
    ],
)
def test_the_newest_every_so_many_and_the_named_are_kept(checkpoints, given, expected):
    assert retained(checkpoints, *given) == expected
    assert retained(checkpoints, *given) == expected


def test_what_the_pointers_name_is_kept(checkpoints):
    (checkpoints / paths.BEST).write_text("20\n")
    assert retained(checkpoints, 1) == [20, 60]


def test_after_a_return_to_an_earlier_one_it_is_counted_from_there(checkpoints):
    (checkpoints / paths.LATEST).write_text("40\n")
    assert retained(checkpoints, 2) == [30, 40, 50, 60]


@pytest.mark.parametrize("text", [None, "", "none\n"])
def test_without_a_pointer_it_is_counted_from_the_newest(checkpoints, text):
    (checkpoints / paths.LATEST).unlink()
    if text is not None:
        (checkpoints / paths.LATEST).write_text(text)
    assert retained(checkpoints, 2) == [50, 60]


def cut(folder: Path) -> None:
    (folder / SHARD).write_bytes(bytes(99))


def flip(folder: Path) -> None:
    content = bytearray((folder / SHARD).read_bytes())
    content[50] ^= 1
    (folder / SHARD).write_bytes(content)


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def lose(folder: Path) -> None:
    (folder / "tokenizer" / "tokenizer.json").unlink()


def forget(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def garble(folder: Path) -> None:
    (folder / MANIFEST).write_bytes(b"\xff{")


@pytest.mark.parametrize("damage", [cut, lose, forget, garble])
def test_damaged_ones_do_not_count(checkpoints, damage):
    for iteration in (40, 60):
        damage(paths.folder_of(checkpoints, iteration))
    assert not is_good(paths.folder_of(checkpoints, 60))
    removed = retain(checkpoints, 2)
    # 50 and 30 are the newest two that are good; the damaged ones above 30 are left to their owner.
    assert [folder.name for folder in removed] == ["iter_0000010", "iter_0000020"]
    assert {path.name for path in checkpoints.glob("iter_*")} == {f"iter_00000{n}" for n in (30, 40, 50, 60)}


@pytest.mark.parametrize("only", [10, 30, 60])
def test_the_only_good_one_is_never_removed(checkpoints, only):
    for iteration in range(10, 70, 10):
        if iteration != only:
            cut(paths.folder_of(checkpoints, iteration))
    for _ in range(2):
        retain(checkpoints, 1)
        assert is_good(paths.folder_of(checkpoints, only))


def test_nothing_is_removed_while_none_is_good(checkpoints):
    for iteration in range(10, 70, 10):
        cut(paths.folder_of(checkpoints, iteration))
    assert retain(checkpoints, 1) == []


def test_a_flipped_byte_does_not_count_where_checksums_are_asked_for(checkpoints, monkeypatch):
    flip(paths.folder_of(checkpoints, 60))
    looked_at = []
    original = retention.check_files
    monkeypatch.setattr(
        retention, "check_files", lambda folder, verify: (looked_at.append(folder), original(folder, verify))
    )
    assert retain(checkpoints, 1, dry_run=True)[-1].name == "iter_0000050"  # sizes tell nothing
    looked_at.clear()
    removed = retain(checkpoints, 1, verify="checksums")
    assert [folder.name for folder in removed] == [f"iter_00000{n}" for n in (10, 20, 30, 40)]
    assert looked_at == [paths.folder_of(checkpoints, n) for n in (60, 50)]  # none that it need not read
    assert is_good(paths.folder_of(checkpoints, 50), "checksums")


def test_prune_keeps_the_newest_that_its_checksums_call_good(checkpoints):
    for iteration in (10, 20):
        shutil.rmtree(paths.folder_of(checkpoints, iteration))
    flip(paths.folder_of(checkpoints, 60))
    removed = [(paths.folder_of(checkpoints, n), size(paths.folder_of(checkpoints, n))) for n in (30, 40)]
    assert prune(checkpoints, 1, 0, (), dry_run=True) == removed and left(checkpoints) == [30, 40, 50, 60]
    assert prune(checkpoints, 1, 0, (), dry_run=False) == removed and left(checkpoints) == [50, 60]
    assert is_good(paths.folder_of(checkpoints, 50), "checksums")


def test_of_a_link_the_link_alone_is_removed(checkpoints, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    folder = paths.folder_of(checkpoints, 10)
    target = folder.rename(elsewhere / folder.name)
    folder.symlink_to(target)
    leftover = checkpoints / "iter_0000005.removed"
    leftover.symlink_to(target)
    (checkpoints / "iter_0000006.removed").symlink_to(elsewhere / "none")
    assert prune(checkpoints, 5, 0, (), dry_run=False) == [(folder, 0)]
    assert sorted(path.name for path in checkpoints.glob("iter_*")) == [
        f"iter_00000{n}" for n in (20, 30, 40, 50, 60)
    ]
    assert is_good(target, "checksums")


def test_an_error_says_what_could_not_be_removed(checkpoints, monkeypatch):
    def fail(folder):
        raise OSError("input/output error")

    monkeypatch.setattr(shutil, "rmtree", fail)
    with pytest.raises(ValueError, match="cannot remove .*iter_0000010: input/output error"):
        prune(checkpoints, 5, 0, (), dry_run=False)


def test_a_removal_that_is_cut_off_leaves_no_half_checkpoint_and_is_finished_later(checkpoints, monkeypatch):
    def cut_off(folder):
        (folder / SHARD).unlink()
        raise OSError("input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", cut_off)
        with pytest.raises(OSError, match="input/output"):
            retain(checkpoints, 5)
    assert sorted(path.name for path in checkpoints.glob("iter_*10*")) == ["iter_0000010.removed"]
    assert paths.iterations(checkpoints) == [60, 50, 40, 30, 20]
    assert retain(checkpoints, 0, dry_run=True) == [] and (checkpoints / "iter_0000010.removed").exists()
    assert retain(checkpoints, 0) == []
    assert left(checkpoints) == [20, 30, 40, 50, 60]


def test_what_is_no_checkpoint_is_left_alone(checkpoints):
    others = [checkpoints / name for name in ("iter_0000070.tmp", "iter_5", "iter_0000010x", "notes")]
    for folder in others:
        folder.mkdir()
    (checkpoints / "iter_0000005").write_text("a file")
    retain(checkpoints, 1)
    assert all(folder.is_dir() for folder in others) and (checkpoints / "iter_0000005").is_file()


def test_a_folder_that_is_not_there_has_nothing_to_remove(tmp_path):
    assert retain(tmp_path / "none", 1) == []


def test_what_one_that_stays_knows_as_the_best_is_kept(checkpoints):
    for iteration in (50, 60):
        folder = paths.folder_of(checkpoints, iteration)
        files = write_files(folder, {"state.json": state_to_json(RunState(iteration, best_iteration=20))})
        write_manifest(folder, Manifest(files, {}))
    assert retained(checkpoints, 2) == [20, 50, 60]


def test_abandoned_ones_have_another_name_and_go_with_retention(checkpoints):
    assert [path.name for path in paths.abandon_after(checkpoints, 40)] == [
        "iter_0000050.abandoned", "iter_0000060.abandoned"
    ]  # fmt: skip
    assert paths.read_pointer(checkpoints / paths.LATEST) == 40
    assert paths.iterations(checkpoints) == [40, 30, 20, 10]
    make(checkpoints, 50)
    paths.abandon_after(checkpoints, 40)  # again: the older one is replaced
    assert retain(checkpoints, 0) == []
    assert len(list(checkpoints.glob("*.abandoned"))) == 2
    assert retained(checkpoints, 4) == [10, 20, 30, 40]


def test_a_run_that_begins_anew_abandons_all(checkpoints, monkeypatch):
    paths.abandon_after(checkpoints, 0)
    assert paths.iterations(checkpoints) == [] and not (checkpoints / paths.LATEST).exists()


def test_a_full_disk_stops_no_return(checkpoints, monkeypatch):
    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(paths, "replace_text", full)
    paths.abandon_after(checkpoints, 40)
    assert paths.iterations(checkpoints)[0] == 40
