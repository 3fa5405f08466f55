"""W&B's offline files, read back for tests."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
