"""What a run's folder tells of it, read without torch; what is missing is empty."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from megatsp.checkpoint.paths import iterations
from megatsp.training.events import EVENTS, objects, read_objects
from megatsp.training.samples import SAMPLES

Entry = dict[str, Any]
_LARGEST = 1e100  # of a metric; what is larger is damage


@dataclass(frozen=True)
class Run:
    """settings: of config.yaml by dotted name. changed: of metrics.jsonl, the newest line's time, or ""."""

    folder: Path
    name: str
    settings: dict[str, Any]
    metrics: list[Entry]
    events: list[Entry]
    attempts: list[Entry]
    samples: list[Entry]
    checkpoints: list[int]
    wandb_id: str
    changed: str


def read_run(folder: Path, names: Collection[str]) -> Run:
    """Reads a run's folder; lines that are damaged are left out, and values that are no finite numbers.

    names: of the metrics that are wanted.

    Raises:
        ValueError: there is no run, or nothing of it: neither a metric, an event nor an attempt of a job.
    """
    if not folder.is_dir():
        raise ValueError(f"no run folder {folder}; give the <output_dir>/<name> of a run")
    attempts: list[Entry] = []
    for file in (folder / "slurm").glob("job_*/attempts.jsonl"):
        attempts += read_objects(file)
    attempts.sort(key=lambda attempt: _number(attempt.get("started")) or 0.0)
    config, path = folder / "config.yaml", folder / "metrics.jsonl"
    if not config.is_file() and not attempts:  # a job may end before its run begins
        raise ValueError(f"{folder} is no run of megatsp: it has no config.yaml")
    metrics, events = list(_metrics(path, names)), read_objects(folder / EVENTS)
    if not metrics and not events and not attempts:
        raise ValueError(f"{path} has no entry yet: nothing was logged; see logging.log_interval")
    try:
        settings = _flat(yaml.safe_load(config.read_text()) or {}) if config.is_file() else {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read {config}: {error}") from error
    id_file = folder / "wandb_run_id"
    return Run(
        folder,
        str(settings.get("name", folder.name)),
        settings,
        metrics,
        events,
        attempts,
        read_objects(folder / SAMPLES),
        sorted(iterations(folder / "checkpoints")),
        id_file.read_text(errors="replace").strip() if id_file.is_file() else "",
        datetime.fromtimestamp(path.stat().st_mtime, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        if metrics
        else "",
    )


def _metrics(path: Path, names: Collection[str]) -> Iterator[Entry]:
    for entry in objects(path):
        if isinstance(entry.get("iteration"), int):
            numbers = {name: number for name in names if (number := _number(entry.get(name))) is not None}
            yield {"iteration": entry["iteration"], **numbers}


def _number(value: Any) -> float | None:
    """None for what cannot be drawn."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < _LARGEST:
        return None
    return float(value)


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, dict):
        return {prefix[:-1]: node}
    return {name: value for key in node for name, value in _flat(node[key], f"{prefix}{key}.").items()}
