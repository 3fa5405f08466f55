"""A run goes on from its newest checkpoint that is whole; all ranks agree on which one that is."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch.distributed as dist
from torch import Tensor, nn

from megatsp.checkpoint import store
from megatsp.checkpoint.agree import on_first
from megatsp.checkpoint.find import passed_over
from megatsp.checkpoint.manifest import Damaged, read_manifest
from megatsp.checkpoint.state import RunState
from megatsp.schema import Config
from megatsp.training.folder import changed_settings, check_settings, find_checkpoints


@dataclass(frozen=True)
class Resumed:
    """A checkpoint that was loaded, what it says, and what loading took; bytes: of all its files."""

    folder: Path
    state: RunState
    seconds: float
    bytes: int


def find_candidates(config: Config) -> list[Path]:
    """What the run may go on from, newest first, on all ranks as rank 0 sees it; rank 0 says what is passed
    over.

    Raises:
        ValueError: on all ranks; see `find_checkpoints`.
    """
    return on_first(lambda: find_checkpoints(config, _say))


def load_newest(
    config: Config,
    candidates: list[Path],
    model: nn.Module,
    tensors: dict[str, Tensor],
    check: Callable[[Path], object],
) -> Resumed:
    """Loads the first of `candidates` that proves whole, on all ranks.

    What is passed over is said, and so is what the configuration has changed since. check: whether the run
    may go on from one; the first one passed before.

    Raises:
        Damaged: none is whole, or with checkpoint.strict the first is not.
        ValueError: a checkpoint is of another model or run.
    """
    is_first = dist.get_rank() == 0
    damage: list[str] = []
    for folder in candidates:
        since = time.perf_counter()
        try:
            if damage:
                on_first(partial(check_settings, config, folder))
                on_first(partial(check, folder))
            state = store.load(folder, model, tensors, config.checkpoint.verify)
        except Damaged as error:
            if config.checkpoint.strict:
                raise Damaged(f"{error}; or set checkpoint.strict=false to go on from an older one") from None
            damage.append(str(error))
            if is_first:
                _say(passed_over(str(error)))
            for tensor in tensors.values():  # for an import has none, and is begun with zeros
                tensor.zero_()
            continue
        seconds = time.perf_counter() - since
        if is_first:
            if damage:
                _say(f"resumes from {folder}, the newest checkpoint that is whole")
            if changed := changed_settings(config, folder):
                _say(changed)
        manifest = on_first(partial(read_manifest, folder))
        return Resumed(folder, state, seconds, manifest.bytes)
    raise Damaged(f"no checkpoint is whole: {'; '.join(damage)}")


def _say(line: str) -> None:
    print(f" {line}", flush=True)
