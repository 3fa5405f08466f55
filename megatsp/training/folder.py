"""The run's folder: made, resumed or refused, never clobbered."""

import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import IO, Any

from megatsp.checkpoint import paths
from megatsp.checkpoint.find import find_good
from megatsp.checkpoint.manifest import FIX, Damaged
from megatsp.checkpoint.state import read_state
from megatsp.compose import from_yaml
from megatsp.schema import Config
from megatsp.training.events import EVENTS
from megatsp.training.logs import read_metrics
from megatsp.training.wandb_run import RUN_ID

LOCK = ".lock"
_SILENT_S = 2.0  # that nobody need be told of a wait
# What a run may leave that ended before it had written its configuration, its job, and a report of both.
_OF_SET_UP = {LOCK, "config.yaml.tmp", "hangs", "out_of_memory", "slurm", EVENTS, "report.html"}

# A resumed run may change anything but these: they decide the model, or which sample comes next. The weights
# that are tuned are compared by content: see `megatsp.training.base`.
FROZEN = (
    "model", "optimizer.name", "trainer.seq_length", "trainer.seed", "finetune.lora_rank",
    "finetune.lora_alpha", "finetune.lora_targets",
)  # fmt: skip

# Keys of `data` that decide which sample comes next; its own content and theirs make the key of the data.
ORDERING = (
    "path", "valid_path", "valid_fraction", "test_path", "test_fraction", "packing", "reset_attention_mask",
    "long_documents", "loss_on",
)  # fmt: skip


def find_checkpoints(config: Config, say: Callable[[str], object]) -> list[Path]:
    """The checkpoints that a run of this name can go on from, newest first; none if the run is new.

    In one process. say: is given a line for each one that is passed over.

    Raises:
        ValueError: the folder holds something else: a run none of whose checkpoints is whole, a run of
            another model or data, or no run at all; with checkpoint.strict, the newest is not whole.
    """
    folder = run_folder(config)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} exists and is not a run of megatsp: choose another name= or output_dir=")
    if not folder.exists() or {file.name for file in folder.iterdir()} <= _OF_SET_UP:
        return []
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"{folder} exists and is not a run of megatsp: {_fix(config)}")
    checkpoints = folder / "checkpoints"
    try:
        paths.recover(checkpoints)
    except OSError as error:
        raise ValueError(f"cannot put {error.filename} back: {error.strerror}") from error
    found = find_good(checkpoints, config.checkpoint.strict, say)
    if not found:
        return []  # it ended before its first checkpoint
    check_settings(config, found[0])
    return found


def check_settings(config: Config, found: Path) -> None:
    """Checks that a checkpoint of the run's folder is of this run.

    Raises:
        ValueError: it is of another model, or of a run whose samples or training are others.
    """
    old = _config_of(found)
    is_import = _is_import(config, found)
    changed = [
        f"{path}: {before!r} there, {now!r} now"
        for key in (("model",) if is_import else FROZEN)
        for path, before, now in _differences(key, _get(old, key), _get(config, key))
    ]
    if not is_import and bool(old.finetune.hf) != bool(config.finetune.hf):  # of train and of sft
        changed.append(f"finetune.hf: {old.finetune.hf!r} there, {config.finetune.hf!r} now")
    if changed:
        raise ValueError(
            f"{run_folder(config)} holds another run; it differs in {'; '.join(changed)}. To start anew, "
            f"{_fix(config)}"
        )


def changed_settings(config: Config, found: Path) -> str:
    """One line of the settings that are others than those that a checkpoint was saved with; "" if none is."""
    if _is_import(config, found):
        return ""
    changed = [
        f"{path} {before!r} -> {now!r}"
        for path, before, now in _differences("", asdict(_config_of(found)), asdict(config))
    ]
    return f"changed since {found.name}: {', '.join(changed)}" if changed else ""


def check_data(config: Config, found: Path, data_key: str) -> None:
    """Checks that a checkpoint's run read the same samples in the same order.

    Raises:
        ValueError: it did not: its cursor would mean other samples.
    """
    saved = read_state(found).data_key
    if not saved or saved == data_key:
        return
    old = _config_of(found)
    changed = [
        f"{path}: {before!r} there, {now!r} now"
        for key in ORDERING
        for path, before, now in _differences(f"data.{key}", asdict(old.data)[key], asdict(config.data)[key])
    ]
    raise ValueError(
        f"{run_folder(config)} holds a run on other data: it differs in "
        f"{'; '.join(changed) or 'the documents themselves'}. To go on, give it the data that it was trained "
        "on; to start anew, choose another name="
    )


class Busy(RuntimeError):
    """What a job's attempt before this one left still uses the run's folder; the next may find it free."""


@contextmanager
def lock(
    folder: Path, patience_s: float = 0.0, is_asked: Callable[[], bool] = lambda: False
) -> Iterator[None]:
    """Makes the folder if need be and keeps other runs out of it.

    patience_s: how long to wait for another process, of a job's attempt before this one on a lost node.
    is_asked: whether this process is to end, and so to wait no longer.

    Raises:
        ValueError: another process trains there, or nothing can be written there.
        Busy: another process trains there still, after the patience.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a+")
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error.strerror}; choose another output_dir=") from error
    with file:
        start, has_said = time.monotonic(), False
        while not _takes(file):
            file.seek(0)
            message = f"process {file.read().strip()} trains in {folder} already"
            if time.monotonic() > start + patience_s or is_asked():
                if patience_s:
                    raise Busy(message)
                raise ValueError(f"{message}: wait for it, or choose another name=")
            if not has_said and time.monotonic() > start + _SILENT_S:
                print(f" {message}: waits for it, for {patience_s:.0f} s", flush=True)
                has_said = True
            time.sleep(0.5)
        with suppress(OSError):  # a full disk: the lock is held all the same
            file.truncate(0)
            job = os.environ.get("SLURM_JOB_ID", "")
            file.write(f"{os.getpid()} on {socket.gethostname()}{f' of job {job}' if job else ''}")
            file.flush()
        yield


def _takes(file: IO[str]) -> bool:
    """Whether the lock was free, and is ours now."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _fix(config: Config) -> str:
    return f"choose another name= (or output_dir=), or remove {run_folder(config)} yourself"


def _is_import(config: Config, found: Path) -> bool:
    """Whether nothing was trained yet: any run of the model may begin there."""
    return found == paths.folder_of(run_folder(config) / "checkpoints", 0)


def _config_of(found: Path) -> Config:
    """What a checkpoint was saved with; that nothing in it is resolved or built is for `from_yaml` to see."""
    try:
        return from_yaml((found / "config.yaml").read_text())
    except (OSError, ValueError) as error:
        raise Damaged(f"{found} is damaged: cannot read config.yaml: {error}; {FIX}") from error


def set_aside(folder: Path) -> str:
    """Puts away the metrics of a run that never came to a checkpoint, for one that begins anew in its folder.

    Returns a line that says so; "" if no step was logged.

    Raises:
        OSError: the file system refuses.
        ValueError: a line is no entry of metrics.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file() or not any(entry["iteration"] for entry in read_metrics(path)):
        return ""
    aside = next(name for i in count(1) if not (name := folder / f"metrics.{i}.jsonl").exists())
    path.rename(aside)
    return f"{folder} holds a run without a checkpoint: begins anew, and keeps its metrics in {aside.name}"


def forget_other_run(folder: Path, config: Config) -> None:
    """Drops the W&B id of a run that never came to a checkpoint, if what begins in its folder is another run.

    That is one with other settings, but for logging and launch: its losses would be drawn as the old one's.
    """
    try:
        before = asdict(from_yaml((folder / "config.yaml").read_text()))
    except (OSError, ValueError):
        return
    now = asdict(config)
    if any(before[key] != now[key] for key in now if key not in ("logging", "launch")):
        (folder / RUN_ID).unlink(missing_ok=True)


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
        prefix = f"{path}." if path else ""
        return [d for key in now for d in _differences(f"{prefix}{key}", before.get(key), now[key])]
    return [] if before == now else [(path, before, now)]
