"""Which checkpoints a run keeps, and the removal of the others."""

import errno
import shutil
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from megatsp.checkpoint.manifest import check_files
from megatsp.checkpoint.paths import ABANDONED, BEST, LATEST, folder_of, iterations, read_pointer, sync
from megatsp.checkpoint.state import read_state

_REMOVED = ".removed"  # the end of the name of a checkpoint that is half removed


def retain(
    checkpoints: Path,
    keep_last: int,
    keep_every: int = 0,
    keep: Collection[int] = (),
    dry_run: bool = False,
    verify: str = "sizes",
) -> list[Path]:
    """Removes old checkpoints and returns their folders, oldest first; dry_run only returns them.

    Those are older than the newest `keep_last` good ones, counted from what LATEST names. Good: with a
    manifest to which its files fit, so that no damaged one takes the place of a good one. Never removed:
    multiples of `keep_every` (0: no others), those in `keep`, what LATEST and BEST name, and what is newer
    than LATEST; nor what one that stays says is the best. Abandoned ones go. keep_last 0 keeps all. On one
    rank.

    verify: sizes, or checksums too, for which the newest are read through until so many good ones are found.

    Raises:
        OSError: a folder cannot be read or removed; it says which.
    """
    removed: list[Path] = []
    if keep_last > 0:
        kept = {*keep, read_pointer(checkpoints / LATEST), read_pointer(checkpoints / BEST)}
        old = [
            iteration
            for iteration in _old(checkpoints, keep_last, verify)
            if iteration not in kept and not (keep_every > 0 and iteration % keep_every == 0)
        ]
        best = {_best_of(folder_of(checkpoints, i)) for i in iterations(checkpoints) if i not in old}
        removed = sorted(checkpoints.glob(f"iter_*{ABANDONED}"))
        removed += [folder_of(checkpoints, iteration) for iteration in reversed(old) if iteration not in best]
    if not dry_run:
        remove(checkpoints, removed)
    return removed


def remove(checkpoints: Path, folders: Iterable[Path]) -> None:
    """Removes these checkpoints, after what an earlier call could not finish.

    A folder is renamed before its files go: half of one never looks like a checkpoint. Of a link to a folder
    the link alone goes; what it points to stays as it is.

    Raises:
        OSError: a folder cannot be removed; it says which.
    """
    finish_removals(checkpoints)
    for folder in folders:
        _remove(folder)


def finish_removals(checkpoints: Path) -> None:
    """Removes what is left of checkpoints whose removal was cut off.

    Raises:
        OSError: a folder cannot be removed; it says which.
    """
    for rest in checkpoints.glob("iter_*" + _REMOVED):
        _remove(rest)


def is_good(folder: Path, verify: str = "sizes") -> bool:
    """Whether a checkpoint has a manifest and every file in it. verify: of its size, or checksums too."""
    try:
        check_files(folder, verify)
    except (OSError, ValueError):
        return False
    return True


def _old(checkpoints: Path, keep_last: int, verify: str) -> Iterator[int]:
    """Iterations below the newest `keep_last` good ones that are not newer than LATEST, falling."""
    latest = read_pointer(checkpoints / LATEST)
    num_good = 0
    for iteration in iterations(checkpoints):
        if latest is not None and iteration > latest:
            continue  # of before a return to an earlier one; the run comes to it again
        if num_good == keep_last:
            yield iteration
        elif is_good(folder_of(checkpoints, iteration), verify):
            num_good += 1


def _best_of(folder: Path) -> int:
    """The iteration of the lowest validation loss so far, as a checkpoint knows it; 0: none."""
    try:
        return read_state(folder).best_iteration
    except (OSError, ValueError):
        return 0


def _remove(folder: Path) -> None:
    try:
        if folder.is_symlink():
            folder.unlink()
            return
        renamed = folder
        if not folder.name.endswith(_REMOVED):
            renamed = folder.rename(folder.with_name(folder.name + _REMOVED))
            sync(folder.parent)  # before the first file goes
        shutil.rmtree(renamed)
    except OSError as error:
        if error.filename is None:
            raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(folder)) from error
        raise
