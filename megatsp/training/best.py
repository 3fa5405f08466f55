"""The lowest validation loss of a fine-tuning, where its checkpoint is, and when to stop."""

import math
from dataclasses import replace
from pathlib import Path

from megatsp.checkpoint.paths import BEST, folder_of, replace_text
from megatsp.checkpoint.state import RunState
from megatsp.schema import Config


def judge(state: RunState, loss: float) -> RunState:
    """The state after an evaluation of its weights; best_iteration is its own iff the loss is the lowest."""
    if math.isfinite(loss) and (not state.best_iteration or loss < state.best_loss):
        return replace(state, best_loss=loss, best_iteration=state.iteration, evaluations_without_gain=0)
    return replace(state, evaluations_without_gain=state.evaluations_without_gain + 1)


def is_exhausted(config: Config, state: RunState) -> bool:
    """Whether finetune.early_stopping ends the run here."""
    return 0 < config.finetune.early_stopping <= state.evaluations_without_gain


def check_best(config: Config, checkpoints: Path, state: RunState) -> None:
    """Checks that a resumed run still has its best checkpoint.

    Raises:
        ValueError: it has not, and would be asked to export it.
    """
    if config.finetune.export == "best" and state.best_iteration and not _folder(checkpoints, state).is_dir():
        raise ValueError(
            f"{_folder(checkpoints, state)}, of the lowest validation loss, is not there: restore it, or set "
            "finetune.export=last or none"
        )


def point_to_best(checkpoints: Path, state: RunState) -> None:
    """Makes the pointer say what the state does; on rank 0, after the checkpoint is there."""
    if state.best_iteration and _folder(checkpoints, state).is_dir():
        replace_text(checkpoints / BEST, f"{state.best_iteration}\n")
    else:
        (checkpoints / BEST).unlink(missing_ok=True)


def _folder(checkpoints: Path, state: RunState) -> Path:
    return folder_of(checkpoints, state.best_iteration)
