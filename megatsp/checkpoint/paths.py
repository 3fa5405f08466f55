"""Where a run's checkpoints are, and which of them its pointers name."""

import os
import shutil
from contextlib import suppress
from pathlib import Path

TOKENIZER = "tokenizer"  # the folder in a checkpoint
LATEST = "latest_checkpointed_iteration.txt"
BEST = "best_checkpointed_iteration.txt"
ABANDONED = ".abandoned"  # the end of the name of a checkpoint of a road that the run has left
_ASIDE = ".old"  # of a checkpoint that another of its iteration replaces
_MOST_DIGITS = 12  # of an iteration that a pointer or a user names


def folder_of(checkpoints: Path, iteration: int) -> Path:
    return checkpoints / f"iter_{iteration:07d}"


def iterations(checkpoints: Path) -> list[int]:
    """Of the folders that are there under a checkpoint's final name, newest first; they need not be whole."""
    names = [path.name.removeprefix("iter_") for path in checkpoints.glob("iter_*")]
    numbers = {int(name) for name in names if name.isascii() and name.isdigit()}
    return sorted((n for n in numbers if folder_of(checkpoints, n).is_dir()), reverse=True)


def parse_iteration(text: str) -> int | None:
    """A plain decimal number of at most 12 ASCII digits; None if the text is anything else."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= _MOST_DIGITS else None


def read_pointer(pointer: Path) -> int | None:
    """The iteration that a pointer file names; None if it is missing, not readable or says anything else."""
    try:
        return parse_iteration(pointer.read_text(errors="replace").strip())
    except OSError:
        return None


def install(temporary: Path, folder: Path, iteration: int) -> None:
    """Gives a whole checkpoint its name and moves the pointer to it; an old one of that name is replaced.

    At every moment the old or the new one is whole: see `recover`. After an error all is as it was.

    Raises:
        OSError: the file system refuses.
    """
    aside = folder.with_name(folder.name + _ASIDE)
    if folder.exists():
        folder.rename(aside)
    try:
        temporary.rename(folder)
        sync(folder.parent)
        replace_text(folder.parent / LATEST, f"{iteration}\n")
    except OSError:
        if not temporary.exists() and folder.exists():
            folder.rename(temporary)
        if aside.exists():
            aside.rename(folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def recover(checkpoints: Path) -> None:
    """Puts a checkpoint back whose replacement was cut off; by one process, before another save begins.

    Raises:
        OSError: the file system refuses.
    """
    for aside in checkpoints.glob(f"iter_*{_ASIDE}"):
        folder = aside.with_name(aside.name.removesuffix(_ASIDE))
        if folder.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.rename(folder)


def abandon_after(checkpoints: Path, iteration: int) -> list[Path]:
    """Gives newer checkpoints another name: the run goes on from this iteration (0 without one: anew).

    LATEST is moved first: wherever this is cut off, the run goes on from there. A disk that is too full for
    that stops nothing.

    Returns: their new names, oldest first.

    Raises:
        OSError: the file system refuses.
    """
    newer = [i for i in reversed(iterations(checkpoints)) if i > iteration]
    if folder_of(checkpoints, iteration).is_dir():
        with suppress(OSError):
            if read_pointer(checkpoints / LATEST) != iteration:
                replace_text(checkpoints / LATEST, f"{iteration}\n")
    else:
        (checkpoints / LATEST).unlink(missing_ok=True)
    renamed = []
    for folder in (folder_of(checkpoints, i) for i in newer):
        target = folder.with_name(folder.name + ABANDONED)
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        renamed.append(folder.rename(target))
    return renamed


def latest(checkpoints: Path) -> Path | None:
    """The newest checkpoint of a run, or None if it has none.

    Raises:
        ValueError: the pointer names a checkpoint that is not there.
    """
    return _pointed_to(checkpoints / LATEST)


def best(checkpoints: Path) -> Path | None:
    """The checkpoint of a fine-tuning's lowest validation loss, or None if nothing was evaluated.

    Raises:
        ValueError: the pointer names a checkpoint that is not there.
    """
    return _pointed_to(checkpoints / BEST)


def chosen(checkpoints: Path, which: str) -> Path:
    """A run's checkpoint. which: last, best, or an iteration in digits.

    Raises:
        ValueError: there is no such checkpoint.
    """
    folder = latest(checkpoints) if which == "last" else best(checkpoints) if which == "best" else None
    iteration = parse_iteration(which)
    if iteration is not None and (folder_of(checkpoints, iteration) / "state.json").exists():
        folder = folder_of(checkpoints, iteration)
    if folder is None:
        which = which if len(which) <= 2 * _MOST_DIGITS else which[: 2 * _MOST_DIGITS] + "..."
        there = ", ".join(sorted(path.name for path in checkpoints.glob("iter_*"))) or "none"
        why = ": only `megatsp sft` with validation data keeps one" if which == "best" else ""
        raise ValueError(f"{checkpoints} has no checkpoint {which}{why} (there: {there})")
    return folder


def _pointed_to(pointer: Path) -> Path | None:
    checkpoints = pointer.parent
    if not pointer.exists():
        return None
    iteration = read_pointer(pointer)
    folder = None if iteration is None else folder_of(checkpoints, iteration)
    if folder is None or not (folder / "state.json").exists():
        text = pointer.read_text(errors="replace").strip()[:40]
        raise ValueError(
            f"{pointer} says {text!r}, but there is no such checkpoint beside it: write the number of one "
            f"that exists into it ({', '.join(sorted(p.name for p in checkpoints.glob('iter_*'))) or 'none'})"
        )
    return folder


def replace_text(path: Path, text: str) -> None:
    """Writes a small file so that it is never half there."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    sync(temporary)
    temporary.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Brings a file, or the list of a folder's files, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
