"""A run's checkpoints as the loop sees them: what is in flight, what became whole, what was lost."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from torch import Tensor

from megatsp.checkpoint.paths import folder_of, iterations
from megatsp.checkpoint.retention import is_good
from megatsp.checkpoint.saver import Failed, Saved, Saver
from megatsp.checkpoint.state import RunState
from megatsp.data.tokenizer import Tokenizer
from megatsp.schema import CheckpointConfig
from megatsp.training.events import Event
from megatsp.training.logs import Reporter


class Saves:
    """Hands checkpoints to a Saver and says what becomes of them. A context manager; on all ranks.

    saved_at: the iteration of the newest whole checkpoint.
    """

    def __init__(
        self,
        checkpoints: Path,
        config: CheckpointConfig,
        state: RunState,
        has_best: bool,
        beat: Callable[[str], None] = lambda what: None,
    ) -> None:
        """state: that the run goes on from. has_best: whether BEST names the lowest validation loss.

        beat: the watchdog's.
        """
        self.saved_at = state.iteration
        self._checkpoints = checkpoints
        self._saver = Saver(checkpoints, config, beat=lambda: beat("waiting for a save"))
        self._has_best, self._closed = has_best, False
        self._given = _key(state)
        # What the newest whole checkpoint knows as the best one, and what is in flight does.
        self._whole_best = self._next_best = (state.best_loss, state.best_iteration)

    def __enter__(self) -> "Saves":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._closed:  # by an error, that is raised once what is in flight is whole
            self._closed = True
            self._saver.close()

    @property
    def finished(self) -> bool:
        """Whether this rank has something to report; the others may not."""
        return self._saver.finished

    def has(self, state: RunState) -> bool:
        """Whether this state was handed over, or read, last."""
        return self._given == _key(state)

    def save(
        self,
        state: RunState,
        tensors: Mapping[str, Tensor],
        extra: Mapping[str, bytes],
        tokenizer: Tokenizer,
        reporter: Reporter,
    ) -> RunState:
        """Saves it; the state after earlier news, as `report` gives it, is what is saved and returned."""
        state = self.wait(state, reporter)
        self._given = _key(state)
        self._next_best = (state.best_loss, state.best_iteration)
        best = state.best_iteration if self._has_best else None
        self._saver.save(state, tensors, extra, tokenizer, best=best, keep=self._before_bad_steps(state))
        return state

    def _before_bad_steps(self, state: RunState) -> list[int]:
        """The checkpoint that a rollback needs if the bad steps that `state` ends with go on."""
        if not state.bad_steps_in_a_row:
            return []
        before = state.iteration - state.bad_steps_in_a_row
        there = (i for i in iterations(self._checkpoints) if i <= before)
        return [i for i in there if is_good(folder_of(self._checkpoints, i))][:1]

    def wait(self, state: RunState, reporter: Reporter) -> RunState:
        """Until nothing is in flight; one that failed is given up. Returns the state as `report` does."""
        self._saver.settle()
        while self._saver.finished:
            state = self.report(state, reporter)
        return state

    def report(self, state: RunState, reporter: Reporter) -> RunState:
        """Says and logs what became of a save; on all ranks, once all are `finished`.

        Returns the state, in which a best checkpoint that was lost is no longer the best.
        """
        news = self._saver.collect()
        return state if news is None else self._tell(news, state, reporter)

    def go_back(self, state: RunState) -> None:
        """The run goes on from this state of an earlier checkpoint."""
        self.saved_at, self._given = state.iteration, _key(state)
        self._whole_best = self._next_best = (state.best_loss, state.best_iteration)

    def close(self, state: RunState, reporter: Reporter) -> Failed | None:
        """Waits for the last save; it, if it could not be written."""
        self._closed = True
        last = self._saver.close()
        while self._saver.finished:
            state = self.report(state, reporter)
        if last is not None:
            self._tell(last, state, reporter)
        return last if isinstance(last, Failed) else None

    def _tell(self, news: Saved | Failed, state: RunState, reporter: Reporter) -> RunState:
        if isinstance(news, Saved):
            self.saved_at, self._whole_best = news.iteration, self._next_best
            metrics = {
                "checkpoint/stall-ms": news.stall_ms,
                "checkpoint/save-s": news.seconds,
                "checkpoint/bytes": news.bytes,
            }
            reporter.log(state.iteration, metrics)
            reporter.say(
                f" saved {news.folder} in {news.seconds:.1f} s; training stood still {news.stall_ms:.0f} ms"
            )
            reporter.event(Event("saved", news.iteration, str(news.folder)))
            if news.problem:
                reporter.say(f" {news.problem}")
            return state
        then = "it is lost" if news.retry_s is None else f"it is tried again in {news.retry_s:.0f} s"
        reporter.say(f" checkpoint of iteration {news.iteration} was not saved: {news.reason}; {then}")
        reporter.event(Event("save failed", news.iteration, f"{news.reason}; {then}"))
        if news.retry_s is None:
            self._given = (-1, -1)
            if state.best_iteration == news.iteration:
                loss, iteration = self._whole_best
                state = replace(state, best_loss=loss, best_iteration=iteration)
        return state


def _key(state: RunState) -> tuple[int, int]:
    """What tells states of a run apart that a checkpoint is made of."""
    return state.iteration, state.evaluated_at
