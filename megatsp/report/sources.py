"""What a run's folder tells of it, read without torch; what is missing is empty."""

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from megatsp.checkpoint.paths import iterations
from megatsp.training.events import EVENTS, read_objects
from megatsp.training.samples import SAMPLES

Entry = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """settings: of config.yaml by dotted name. changed: of metrics.jsonl, the newest line's time."""

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


def read_run(folder: Path) -> Run:
    """Reads a run's folder; lines that are damaged are left out.

    Raises:
        ValueError: there is no run, or it has logged nothing yet.
    """
    if not folder.is_dir():
        raise ValueError(f"no run folder {folder}; give the <output_dir>/<name> of a run")
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"{folder} is no run of megatsp: it has no config.yaml")
    path = folder / "metrics.jsonl"
    metrics = [entry for entry in read_objects(path) if isinstance(entry.get("iteration"), int)]
    if not metrics:
        raise ValueError(f"{path} has no entry yet: nothing was logged; see logging.log_interval")
    try:
        settings = _flat(yaml.safe_load((folder / "config.yaml").read_text()) or {})
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read {folder / 'config.yaml'}: {error}") from error
    attempts: list[Entry] = []
    for file in sorted((folder / "slurm").glob("job_*/attempts.jsonl")):
        attempts += read_objects(file)
    id_file = folder / "wandb_run_id"
    return Run(
        folder,
        str(settings.get("name", folder.name)),
        settings,
        metrics,
        read_objects(folder / EVENTS),
        attempts,
        read_objects(folder / SAMPLES),
        sorted(iterations(folder / "checkpoints")),
        id_file.read_text(errors="replace").strip() if id_file.is_file() else "",
        datetime.fromtimestamp(path.stat().st_mtime, UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
    )


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, dict):
        return {prefix[:-1]: node}
    return {name: value for key in node for name, value in _flat(node[key], f"{prefix}{key}.").items()}
