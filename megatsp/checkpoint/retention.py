"""Which checkpoints a run keeps, and the removal of the others."""

import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

from megatsp.checkpoint.manifest import read_manifest, size_problems
from megatsp.checkpoint.paths import BEST, LATEST, folder_of, iterations, read_pointer, sync

_REMOVED = ".removed"  # the end of the name of a checkpoint that is half removed


def retain(
    checkpoints: Path, keep_last: int, keep_every: int = 0, keep: Collection[int] = (), dry_run: bool = False
) -> list[Path]:
    """Removes old checkpoints and returns their folders, oldest first; dry_run only returns them.

    Those are older than the newest `keep_last` good ones, counted from what LATEST names. Good: with a
    manifest to which its files' sizes fit, so that no damaged one takes the place of a good one. Never
    removed: multiples of `keep_every` (0: no others), those in `keep`, what LATEST and BEST name, and what is
    newer than LATEST. keep_last 0 keeps all. A folder is renamed before its files go: half of one never looks
    like a checkpoint. What an earlier call could not finish is removed too. On one rank.

    Raises:
        OSError: a folder cannot be read or removed.
    """
    if not dry_run:
        for rest in checkpoints.glob("iter_*" + _REMOVED):
            shutil.rmtree(rest)
    old = list(_old(checkpoints, keep_last)) if keep_last > 0 else []
    kept = {*keep, read_pointer(checkpoints / LATEST), read_pointer(checkpoints / BEST)}
    removed = [
        folder_of(checkpoints, iteration)
        for iteration in reversed(old)
        if iteration not in kept and not (keep_every > 0 and iteration % keep_every == 0)
    ]
    if not dry_run:
        for folder in removed:
            _remove(folder)
    return removed


def is_good(folder: Path) -> bool:
    """Whether a checkpoint has a manifest and every file in it, of the size that is said there."""
    try:
        return not size_problems(folder, read_manifest(folder))
    except (OSError, ValueError):
        return False


def _old(checkpoints: Path, keep_last: int) -> Iterator[int]:
    """Iterations below the newest `keep_last` good ones that are not newer than LATEST, falling."""
    latest = read_pointer(checkpoints / LATEST)
    num_good = 0
    for iteration in iterations(checkpoints):
        if latest is not None and iteration > latest:
            continue  # of before a return to an earlier one; the run comes to it again
        if num_good == keep_last:
            yield iteration
        elif is_good(folder_of(checkpoints, iteration)):
            num_good += 1


def _remove(folder: Path) -> None:
    renamed = folder.with_name(folder.name + _REMOVED)
    folder.rename(renamed)
    sync(folder.parent)  # before the first file goes
    shutil.rmtree(renamed)
