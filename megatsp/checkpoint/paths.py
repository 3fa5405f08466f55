"""Where a run's checkpoints are, and which of them its pointers name."""

import os
from pathlib import Path

TOKENIZER = "tokenizer"  # the folder in a checkpoint
LATEST = "latest_checkpointed_iteration.txt"
BEST = "best_checkpointed_iteration.txt"


def folder_of(checkpoints: Path, iteration: int) -> Path:
    return checkpoints / f"iter_{iteration:07d}"


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
    if which.isdecimal() and (folder_of(checkpoints, int(which)) / "state.json").exists():
        folder = folder_of(checkpoints, int(which))
    if folder is None:
        there = ", ".join(sorted(path.name for path in checkpoints.glob("iter_*"))) or "none"
        why = ": only `megatsp sft` with validation data keeps one" if which == "best" else ""
        raise ValueError(f"{checkpoints} has no checkpoint {which}{why} (there: {there})")
    return folder


def _pointed_to(pointer: Path) -> Path | None:
    checkpoints = pointer.parent
    if not pointer.exists():
        return None
    text = pointer.read_text().strip()
    folder = folder_of(checkpoints, int(text)) if text.isdigit() else None
    if folder is None or not (folder / "state.json").exists():
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
