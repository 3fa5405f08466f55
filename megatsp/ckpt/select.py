"""Which checkpoint, or which folder of checkpoints, a user means."""

from pathlib import Path

from megatsp.checkpoint.manifest import MANIFEST
from megatsp.checkpoint.paths import LATEST, chosen, iterations


def checkpoints_of(path: Path) -> Path:
    """The folder of checkpoints in a run's folder, or `path` itself.

    Raises:
        ValueError: there is none.
    """
    for folder in (path / "checkpoints", path):
        if iterations(folder) or (folder / LATEST).exists() or any(folder.glob("iter_*")):
            return folder
    raise ValueError(
        f"no checkpoints in {path}: give a run's folder, <output_dir>/<name>, or its checkpoints/"
    )


def find(path: Path, which: str | None = None) -> Path:
    """One checkpoint: `path` itself, or that of a run.

    which: last (None), best, or an iteration in digits.

    Raises:
        ValueError: there is no such one, or both `path` and `which` name one.
    """
    if (path / MANIFEST).exists() or (path / "state.json").exists():
        if which is not None:
            raise ValueError(f"--checkpoint {which}: {path} is one checkpoint already; leave the option out")
        return path
    if which not in (None, "last", "best") and not which.isdecimal():
        raise ValueError(f"--checkpoint {which}: give last, best or an iteration")
    return chosen(checkpoints_of(path), which or "last")
