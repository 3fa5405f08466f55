"""`megatsp ckpt prune`: the retention of checkpoints, without a run."""

from collections.abc import Collection
from pathlib import Path

from megatsp.checkpoint.paths import iterations
from megatsp.checkpoint.retention import remove, retain


def prune(
    checkpoints: Path, keep_last: int, keep_every: int, keep: Collection[int], dry_run: bool
) -> list[tuple[Path, int]]:
    """Removes old checkpoints: see `retain`. Returns (folder, bytes) of each; dry_run only returns them.

    What stays as one of the newest good ones has been read through, by checksum: a byte that has flipped does
    not make the last good one go. The bytes of a link are 0: what it points to stays.

    Raises:
        ValueError: a number makes no sense, an iteration is not there, a folder cannot be removed.
    """
    if keep_last < 1:
        raise ValueError(f"--keep-last {keep_last}: must be at least 1")
    if keep_every < 0:
        raise ValueError(f"--keep-every {keep_every}: must be at least 0")
    there = iterations(checkpoints)
    if missing := sorted(set(keep) - set(there)):
        shown = ", ".join(map(str, sorted(there))) or "none"
        raise ValueError(f"--keep {missing[0]}: there is no such checkpoint (there: {shown})")
    try:
        old = retain(checkpoints, keep_last, keep_every, keep, dry_run=True, verify="checksums")
        sizes = [0 if folder.is_symlink() else _bytes_of(folder) for folder in old]
        if not dry_run:
            remove(checkpoints, old)
    except OSError as error:
        raise ValueError(f"cannot remove {error.filename}: {error.strerror}") from error
    return list(zip(old, sizes, strict=True))


def _bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
