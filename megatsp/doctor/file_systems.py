"""The folder of runs: whether it can be written and locked, brings data to the disk, and how fast."""

import errno
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from megatsp.checkpoint.paths import sync
from megatsp.doctor.finding import OK, PROBLEM, WARNING, Finding

_LITTLE_BYTES, _TOO_LITTLE_BYTES = 20 << 30, 1 << 30
_NEARLY_FULL = 0.95
_SLOW_BYTES_PER_S = 100e6
PROBE_BYTES = 64 << 20
CHECK = "file systems"


def nearest_folder(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def type_of(folder: Path, mounts: str) -> str:
    """A folder's file system by the text of /proc/mounts; "" if it says nothing."""
    path, best, kind = str(folder.resolve()), "", ""
    for line in mounts.splitlines():
        fields = line.split()
        if len(fields) < 3:
            continue
        point = fields[1].replace("\\040", " ")
        if (path == point or path.startswith(point.rstrip("/") + "/")) and len(point) >= len(best):
            best, kind = point, fields[2]
    return kind


def check_space(folder: Path, kind: str, total_bytes: int, free_bytes: int) -> Iterator[Finding]:
    used = 1 - free_bytes / max(1, total_bytes)
    text = f"{folder}: {free_bytes / 2**30:,.1f} GiB free of {total_bytes / 2**30:,.1f} GiB ({kind or '?'})"
    fix = "make room (megatsp ckpt prune), set checkpoint.keep_last, or choose another output_dir"
    if free_bytes < _TOO_LITTLE_BYTES:
        yield Finding(CHECK, "space", PROBLEM, text, fix)
    elif free_bytes < _LITTLE_BYTES or used > _NEARLY_FULL:
        yield Finding(CHECK, "space", WARNING, text, fix)
    elif kind in ("tmpfs", "ramfs"):
        fix = "choose an output_dir on a disk: this one is in memory, and gone when the host restarts"
        yield Finding(CHECK, "space", WARNING, text, fix)
    else:
        yield Finding(CHECK, "space", OK, text)


def check_writing(folder: Path, probe_bytes: int) -> Iterator[Finding]:
    """Writes, syncs, renames, locks and removes files of its own under `folder`."""
    try:
        probe = Path(tempfile.mkdtemp(prefix=".megatsp-doctor-", dir=folder))
    except OSError as error:
        fix = "give yourself the right to write there, or choose another output_dir"
        yield Finding(CHECK, "writing", PROBLEM, f"{folder}: {error.strerror}", fix)
        return
    try:
        yield _write(probe, probe_bytes)
        yield _lock(probe)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        fix = "make room, or raise the quota" if full else "choose an output_dir on another file system"
        yield Finding(CHECK, "writing", PROBLEM, f"{folder}: {error.strerror}", fix)
    finally:
        shutil.rmtree(probe, ignore_errors=True)


def _write(probe: Path, probe_bytes: int) -> Finding:
    part = os.urandom(1 << 20)  # what a file system cannot compress
    begun = time.perf_counter()
    with (probe / "part.tmp").open("wb") as file:
        for _ in range(max(1, probe_bytes // len(part))):
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - begun
    (probe / "part.tmp").rename(probe / "part")
    sync(probe)
    return judge_speed(max(probe_bytes, len(part)) / seconds)


def judge_speed(bytes_per_s: float) -> Finding:
    text = f"{bytes_per_s / 1e6:,.0f} MB/s by one process, brought to the disk and renamed"
    if bytes_per_s < _SLOW_BYTES_PER_S:
        fix = "choose a faster output_dir, or leave checkpoint.async_save on and save more rarely"
        return Finding(CHECK, "writing", WARNING, text, fix)
    return Finding(CHECK, "writing", OK, text)


def _lock(probe: Path) -> Finding:
    with (probe / "lock").open("w") as one, (probe / "lock").open("w") as other:
        try:
            fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return judge_lock(error.strerror or "")
        try:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return judge_lock("")
        return judge_lock("a second one was given to whom it should have kept out")


def judge_lock(wrong: str) -> Finding:
    if wrong:
        fix = "mount with locks (NFS: not nolock; Lustre: -o flock); else two runs can write one folder"
        return Finding(CHECK, "locks", PROBLEM, wrong, fix)
    return Finding(CHECK, "locks", OK, "flock keeps a second run out")


def check_output(output_dir: Path, probe_bytes: int) -> Iterator[Finding]:
    """All of this module, of the folder that runs are written to; it need not exist yet."""
    folder = nearest_folder(output_dir)
    mounts = Path("/proc/mounts")
    usage = shutil.disk_usage(folder)
    kind = type_of(folder, mounts.read_text() if mounts.is_file() else "")
    yield from check_space(folder, kind, usage.total, usage.free)
    yield from check_writing(folder, min(probe_bytes, usage.free // 2))
