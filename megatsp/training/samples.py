"""Texts that the model continued while it was trained: <run>/samples.jsonl, an object a prompt."""

import json
import os
from pathlib import Path
from typing import Any

from megatsp.training.events import append_objects, read_objects

SAMPLES = "samples.jsonl"
_MOST_SHOWN = 120  # characters on the console


def drop_after(folder: Path, iteration: int) -> int:
    """Cuts samples of later iterations off, and a line that is not whole; that needs no room on a full disk.

    Returns the iteration of the last that stays, or 0.
    """
    path = folder / SAMPLES
    if not path.exists():
        return 0
    size, last = 0, 0
    content = path.read_bytes()
    for line in content.splitlines(True):
        try:
            own = json.loads(line)["iteration"] if line.endswith(b"\n") else iteration + 1
        except (ValueError, LookupError, TypeError):  # damaged, and between others
            own = last
        if own > iteration:
            break
        size, last = size + len(line), own
    if size < len(content):
        os.truncate(path, size)
    return last


def append_samples(folder: Path, iteration: int, samples: list[dict[str, str]]) -> None:
    """Raises OSError if they cannot be written."""
    append_objects(folder / SAMPLES, [{"iteration": iteration, **sample} for sample in samples])


def by_iteration(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """The samples of a run's folder."""
    found: dict[int, list[dict[str, Any]]] = {}
    for entry in read_objects(folder / SAMPLES):
        if {"iteration", "prompt", "continuation"} <= entry.keys():
            found.setdefault(entry["iteration"], []).append(entry)
    return found


def sample_line(iteration: int, sample: dict[str, str]) -> str:
    """What the log says of one: prompt and continuation with their line breaks escaped."""
    shown = repr(sample["continuation"])
    more = "..." if len(shown) > _MOST_SHOWN else ""
    return f" sample at iteration {iteration}: {sample['prompt'][:40]!r} goes on {shown[:_MOST_SHOWN]}{more}"
