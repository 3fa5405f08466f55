"""`megatsp ckpt prune`: the retention of checkpoints, without a run."""

from collections.abc import Collection
from pathlib import Path

from megatsp.checkpoint.paths import iterations
from megatsp.checkpoint.retention import retain


def prune(
    checkpoints: Path, keep_last: int, keep_every: int, keep: Collection[int], dry_run: bool
) -> list[tuple[Path, int]]:
    """Removes old checkpoints: see `retain`. Returns (folder, bytes) of each; dry_run only returns them.

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
        old = retain(checkpoints, keep_last, keep_every, keep, dry_run=True)
        sizes = [sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) for folder in old]
        if not dry_run:
            removed = retain(checkpoints, keep_last, keep_every, keep)
            assert removed == old, (removed, old)
    except OSError as error:
        raise ValueError(f"cannot remove {error.filename}: {error.strerror}") from error
    return list(zip(old, sizes, strict=True))
