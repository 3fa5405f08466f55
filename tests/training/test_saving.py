"""Saves as the loop sees them: what is said of those that fail, and of a best one that is lost."""

from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatsp.checkpoint.manifest import Manifest, write_manifest
from megatsp.checkpoint.paths import folder_of
from megatsp.checkpoint.saver import Failed, Saved
from megatsp.checkpoint.state import RunState
from megatsp.schema import CheckpointConfig
from megatsp.training import saving
from megatsp.training.events import Event
from megatsp.training.saving import Saves


class FakeSaver:
    """Gives what a test says it found."""

    def __init__(self, checkpoints: Any, config: Any, beat: Any) -> None:
        self.outcomes: deque[Saved | Failed] = deque()
        self.given: list[tuple[int, int | None]] = []
        self.kept: Any = None

    def save(self, state: RunState, *rest: Any, best: int | None = None, keep: Any = ()) -> None:
        self.given.append((state.iteration, best))
        self.kept = keep

    def settle(self) -> None:
        pass

    @property
    def finished(self) -> bool:
        return bool(self.outcomes)

    def collect(self) -> Saved | Failed | None:
        return self.outcomes.popleft() if self.outcomes else None

    def close(self) -> Saved | Failed | None:
        return self.outcomes.pop() if self.outcomes else None


class Notes:
    """A reporter's lines and entries."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.entries: list[dict[str, Any]] = []
        self.events: list[tuple[str, int]] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

    def log(self, iteration: int, metrics: dict[str, Any]) -> None:
        self.entries.append({"iteration": iteration, **metrics})

    def event(self, event: Event) -> None:
        self.events.append((event.kind, event.iteration))


def test_a_best_checkpoint_that_is_lost_is_no_longer_the_best(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(saving, "Saver", FakeSaver)
    notes: Any = Notes()
    saves = Saves(tmp_path, CheckpointConfig(), RunState(), has_best=True)
    outcomes = saves._saver.outcomes  # type: ignore[attr-defined]
    first = RunState(iteration=2, best_iteration=2, best_loss=3.0)
    state = saves.save(first, {}, {}, None, notes)  # type: ignore[arg-type]
    outcomes.append(Saved(tmp_path / "iter_0000002", 2, 1.5, 0.5, 100))
    state = replace(state, iteration=4, best_iteration=4, best_loss=2.5)
    state = saves.save(state, {}, {}, None, notes)  # type: ignore[arg-type]
    assert saves.saved_at == 2 and saves.has(state)
    assert notes.entries == [
        {"iteration": 4, "checkpoint/stall-ms": 1.5, "checkpoint/save-s": 0.5, "checkpoint/bytes": 100}
    ]
    outcomes.append(Failed(4, "No space left on device", 5.0))
    state = saves.report(replace(state, iteration=5), notes)
    assert notes.events == [("saved", 2), ("save failed", 4)]
    assert notes.lines[-1] == (
        " checkpoint of iteration 4 was not saved: No space left on device; it is tried again in 5 s"
    )
    assert state.best_iteration == 4
    outcomes.append(Failed(4, "a newer one takes its place", None))
    state = saves.save(replace(state, iteration=6), {}, {}, None, notes)  # type: ignore[arg-type]
    assert (state.best_iteration, state.best_loss) == (2, 3.0)
    assert saves._saver.given == [(2, 2), (4, 4), (6, 2)]  # type: ignore[attr-defined]
    outcomes.append(Failed(6, "No space left on device", None))
    lost = saves.close(state, notes)
    assert lost is not None and lost.iteration == 6 and saves.saved_at == 2


def test_a_save_amid_bad_steps_keeps_the_checkpoint_from_before_them(
    tmp_path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(saving, "Saver", FakeSaver)
    saves = Saves(tmp_path, CheckpointConfig(keep_last=1), RunState(), has_best=False)
    for iteration in (2, 4, 6):
        write_manifest(make_folder(folder_of(tmp_path, iteration)), Manifest({}, {}))
    make_folder(folder_of(tmp_path, 5))  # not whole
    for row, kept in ((0, []), (1, [4]), (2, [4]), (3, [2]), (6, [])):
        state = RunState(iteration=6, bad_steps_in_a_row=row)
        saves.save(state, {}, {}, None, Notes())  # type: ignore[arg-type]
        assert saves._saver.kept == kept  # type: ignore[attr-defined]


def make_folder(path: Path) -> Path:
    path.mkdir()
    return path
