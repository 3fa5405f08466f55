"""W&B's offline files, read back for tests."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from waiting import wait_until
from wandb.proto import wandb_internal_pb2

from megatsp.training.wandb_file import records


def parsed(file: Path) -> Iterator[Any]:
    """The records of a .wandb file."""
    for record in records(file.read_bytes()):
        found = wandb_internal_pb2.Record()
        found.ParseFromString(record)
        yield found


def rows(file: Path) -> list[tuple[int, dict[str, Any]]]:
    """Step and values of its rows, without those that W&B adds."""
    found = []
    for record in parsed(file):
        if record.WhichOneof("record_type") == "history":
            named = {"/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            found.append((record.history.step.num, {k: v for k, v in named.items() if not k.startswith("_")}))
    return found


def all_rows(run: Path) -> list[tuple[int, dict[str, Any]]]:
    """Those of all starts of a run's folder, in order."""
    return [row for file in sorted((run / "wandb").glob("offline-run-*/*.wandb")) for row in rows(file)]


def date_back(run: Path, number: int) -> Path:
    """Gives the folder of the newest start the date of an earlier day: W&B names folders by the second.

    number: of the start, from 1. Returns the folder, in which nothing writes any more.
    """
    folder = max((run / "wandb").glob("*run-2*"))
    wait_until(lambda: not is_open_below(folder), f"W&B has closed {folder}")
    words = folder.name.split("-")  # offline-run-20260131_235959-ID, or without the first
    date = words.index("run") + 1
    words[date] = f"200001{number:02d}_000000"
    return folder.rename(folder.with_name("-".join(words)))


def is_open_below(folder: Path) -> bool:
    """Whether a process has a file in the folder open."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(os.readlink(file).startswith(f"{folder}/") for file in (process / "fd").iterdir()):
                return True
        except OSError:
            continue
    return False
