"""The files by which preflight tells a job's script which nodes to run on."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatsp.checkpoint.paths import replace_text

NODES = "nodes.txt"  # the nodes that the job runs on
PRESENT = "present.txt"  # those and the good spares: what is measured
ROLL_CALL = "roll_call.json"
MEASURED = "preflight.json"


def write_names(path: Path, names: Sequence[str]) -> None:
    """One name a line, in the order of the allocation."""
    replace_text(path, "".join(f"{name}\n" for name in names))


def read_names(path: Path) -> list[str]:
    """What `write_names` wrote."""
    return path.read_text().split()


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    replace_text(path, json.dumps(report, indent=1) + "\n")


def read_report(path: Path) -> dict[str, Any]:
    """What `write_report` wrote."""
    report: dict[str, Any] = json.loads(path.read_text())
    return report
