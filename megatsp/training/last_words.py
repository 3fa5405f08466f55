"""What a run says at its end: why it ended, what its exit status means, where everything is."""

import sys
from collections.abc import Iterator
from pathlib import Path

from megatsp.checkpoint.paths import folder_of
from megatsp.checkpoint.saver import Failed
from megatsp.checkpoint.state import RunState
from megatsp.exit_status import HARDWARE
from megatsp.schema import Config
from megatsp.training.logs import read_metrics
from megatsp.training.plot import plot_loss
from megatsp.training.progress import is_over, why_ended
from megatsp.training.stopping import Stop


def last_words(config: Config, state: RunState, stop: Stop | None, status: int) -> Iterator[str]:
    """Lines of the log. stop: what the ranks agreed to stop for."""
    if status == HARDWARE:
        yield (
            f" exit status {status}: the numbers of iteration {state.iteration + 1} were bad twice, with "
            "other bits; nothing was saved after that. Take the machine away, and the same command goes on"
        )
    elif is_over(config, state):
        if state.iteration < config.trainer.train_iters:
            yield f" {why_ended(config, state)}"
    elif stop is not None:
        yield f" interrupted: stopped after iteration {state.iteration}; the same command resumes"
    if stop is not None:
        yield stop.line(status)


def say_lost(lost: Failed, saved_at: int) -> None:
    """That the last checkpoint was not written, on stderr."""
    kept = f"the last one is of iteration {saved_at}" if saved_at else "there is no other"
    print(
        f"megatsp: error: the checkpoint of iteration {lost.iteration} could not be written: {lost.reason}; "
        f"{kept}. Mend that, and the same command goes on from there",
        file=sys.stderr,
        flush=True,
    )


def sum_up(folder: Path, name: str, iteration: int, saved_at: int) -> None:
    """Plots the losses of a run's folder, and says what is where."""
    entries = read_metrics(folder / "metrics.jsonl")
    if saved_at:
        print(f" checkpoint: {folder_of(folder / 'checkpoints', saved_at)}")
    print(f" metrics:    {folder / 'metrics.jsonl'}")
    if entries:
        plot_loss(entries, folder / "loss.png", f"{name}, iteration {iteration}")
        print(f" plot:       {folder / 'loss.png'}", flush=True)
