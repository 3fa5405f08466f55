"""What happens to a run beside its numbers: <run>/events.jsonl, an object a line.

Unlike metrics, events are never taken back: after a resume they still say what there was.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatsp.checkpoint.state import RunState
from megatsp.exit_status import HARDWARE, NOT_SAVED, REQUEUE
from megatsp.schema import Config
from megatsp.training.progress import is_over, why_ended
from megatsp.training.stopping import Stop

EVENTS = "events.jsonl"
_MOST_TEXT = 2000  # characters


@dataclass(frozen=True)
class Event:
    """kind: a word or two. alert: W&B's level INFO, WARN or ERROR; empty: it is not worth a message."""

    kind: str
    iteration: int
    text: str
    alert: str = ""


def append_event(folder: Path, event: Event) -> None:
    """Writes it into a run's folder.

    Raises:
        OSError: that cannot be written.
    """
    entry = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "iteration": event.iteration,
        "kind": event.kind,
        "text": event.text[:_MOST_TEXT],
    }
    append_objects(folder / EVENTS, [entry])


def append_objects(path: Path, entries: Sequence[dict[str, Any]]) -> None:
    """Adds objects to a file with one a line, on lines of their own also after one that a kill has torn.

    Raises:
        OSError: they cannot be written.
    """
    with path.open("a+b", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        torn = file.read(1) not in (b"", b"\n")
        file.write(b"\n" * torn + b"".join(json.dumps(entry).encode() + b"\n" for entry in entries))


def read_objects(path: Path) -> list[dict[str, Any]]:
    """The objects of a file with one a line, none if there is no file; damaged lines are left out."""
    return list(objects(path))


def objects(path: Path) -> Iterator[dict[str, Any]]:
    """The same, one after the other: a long run's metrics take gigabytes of memory."""
    if not path.is_file():
        return
    with path.open(errors="replace") as file:
        for line in file:
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict):
                yield entry


def of_start(iteration: int, about: dict[str, Any]) -> Event:
    """about: see `megatsp.training.origin`."""
    mesh, job = about["mesh"], about.get("slurm", {})
    nodes = f"{mesh['nodes']} node{'s' * (mesh['nodes'] > 1)}"
    text = f"{mesh['world_size']} ranks on {nodes}, rank 0 on {mesh['host']}"
    if job:
        text += f"; Slurm job {job['job_id']}, restart {job['restart']}"
    return Event("resumed" if iteration else "started", iteration, text)


def of_step(before: RunState, after: RunState, lines: Sequence[str]) -> Iterator[Event]:
    """A streak of bad steps that begins, a spike, and a step that was good the second time.

    lines: what the log said of the step.
    """
    text = "\n".join(line.strip() for line in lines)
    if after.bad_steps_in_a_row and not before.bad_steps_in_a_row:
        yield Event("not finite", after.iteration, text, "WARN")
    if after.loss_spikes > before.loss_spikes:
        yield Event("spike", after.iteration, text, "WARN")
    elif lines and after.iteration > before.iteration and not after.bad_steps_in_a_row:
        yield Event("other bits", after.iteration, text, "WARN")


def of_end(config: Config, state: RunState, stop: Stop | None, status: int) -> Event:
    """Of a start that ended in good order; one that is to be started again needs no message."""
    at = f"after iteration {state.iteration}"
    if status == HARDWARE:
        return Event("hardware", state.iteration, f"stopped {at}: a machine is suspected", "ERROR")
    if status == NOT_SAVED:
        return Event("not saved", state.iteration, f"stopped {at}: its checkpoint was lost", "ERROR")
    if is_over(config, state):
        early = state.iteration < config.trainer.train_iters
        text = why_ended(config, state) if early else f"all {state.iteration} iterations are made"
        return Event("finished", state.iteration, text, "INFO")
    heard = stop.line(status).strip() if stop is not None else ""
    kind = "to be requeued" if status == REQUEUE else "stopped"
    return Event(kind, state.iteration, f"stopped {at}; {heard}")
