"""Which of a run's checkpoints it can go on from."""

from collections.abc import Callable
from pathlib import Path

from megatsp.checkpoint.manifest import FIX, Damaged, check_folder
from megatsp.checkpoint.paths import LATEST, folder_of, iterations, read_pointer
from megatsp.checkpoint.state import read_state


def find_good(checkpoints: Path, strict: bool, say: Callable[[str], object]) -> list[Path]:
    """The checkpoints that are whole by their manifest, the sizes of all files and the checksums of the small
    ones, with a state of their iteration; newest first, none newer than the pointer says. In one process.

    strict: the newest one must be whole. say: is given a line for each one that is not, and for a pointer
    that says nothing.

    Raises:
        Damaged: none is whole, and some are there; with `strict`: the newest is not whole.
        ValueError: a checkpoint is of a later version, or lists files outside its folder.
    """
    there = iterations(checkpoints)
    newest = read_pointer(checkpoints / LATEST)
    if newest is None and there:
        trouble = f"{checkpoints / LATEST} is missing or names no checkpoint"
        if strict:
            raise Damaged(
                f"{trouble}, and checkpoint.strict=true: write {there[0]} into it to go on from there"
            )
        say(f"{trouble}: the newest whole one of {len(there)} is taken")
    elif newest is None and (checkpoints / LATEST).exists():
        raise Damaged(f"{checkpoints / LATEST} names no checkpoint, and there is none beside it")
    elif newest is not None and newest not in there:
        there = sorted({*there, newest}, reverse=True)
    good: list[Path] = []
    bad: list[str] = []
    for iteration in there:
        if newest is not None and iteration > newest:
            continue
        folder = folder_of(checkpoints, iteration)
        try:
            check_folder(folder)
            read_state(folder)
        except Damaged as error:
            if strict and not good:
                raise Damaged(f"{error}; or set checkpoint.strict=false to go on from an older one") from None
            bad.append(str(error))
            continue
        good.append(folder)
    if bad and not good:
        raise Damaged(f"{checkpoints} has no whole checkpoint: {'; '.join(bad)}")
    for line in bad:
        say(passed_over(line))
    return good


def passed_over(damage: str) -> str:
    """The line for a checkpoint that a run goes on without: what is wrong, and no advice to mend it."""
    return f"passed over: {damage.removesuffix(f'; {FIX}')}"
