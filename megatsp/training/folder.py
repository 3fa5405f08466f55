"""The run's folder: made, resumed or refused, never clobbered."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatsp.compose import from_yaml
from megatsp.schema import Config
from megatsp.training import checkpoint

# A resumed run may change anything but these: they decide the model, or which sample comes next.
FROZEN = ("model", "data", "optimizer.name", "trainer.seq_length", "trainer.seed")


def find_checkpoint(config: Config) -> Path | None:
    """The checkpoint that a run of this name goes on from; None if the run is new.

    Raises:
        ValueError: the folder holds something else: a run without a checkpoint, a run of another
            model or data, or no run at all.
    """
    folder = run_folder(config)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    fix = f"choose another name= (or output_dir=), or remove {folder} yourself"
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"{folder} exists and is not a run of megatsp: {fix}")
    found = checkpoint.latest(folder / "checkpoints")
    if found is None:
        raise ValueError(f"{folder} holds a run that has no checkpoint to resume from: {fix}")
    old = from_yaml((found / "config.yaml").read_text())
    changed = [
        f"{path}: {before!r} there, {now!r} now"
        for key in FROZEN
        for path, before, now in _differences(key, _get(old, key), _get(config, key))
    ]
    if changed:
        raise ValueError(
            f"{folder} holds another run; it differs in {'; '.join(changed)}. To start anew, {fix}"
        )
    return found


def run_folder(config: Config) -> Path:
    return Path(config.output_dir) / config.name


def _get(config: Config, path: str) -> Any:
    value: Any = asdict(config)
    for key in path.split("."):
        value = value[key]
    return value


def _differences(path: str, before: Any, now: Any) -> list[tuple[str, Any, Any]]:
    """(dotted path, before, now) of every leaf that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        return [d for key in now for d in _differences(f"{path}.{key}", before.get(key), now[key])]
    return [] if before == now else [(path, before, now)]
