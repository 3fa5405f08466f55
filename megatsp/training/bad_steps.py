"""Steps whose loss or gradients are not finite, or whose loss leaps: what becomes of each, and of the run."""

from dataclasses import dataclass, replace
from enum import Enum

from megatsp.checkpoint.state import RunState
from megatsp.schema import TrainerConfig
from megatsp.training.spikes import is_spike, with_loss


class Verdict(Enum):
    """What becomes of a step."""

    UPDATE = "its update is made"
    SKIP = "it counts, without an update"
    ROLL_BACK = "the run goes on from an earlier checkpoint, without its samples"
    STOP = "the run ends"
    SUSPECT = "the run ends: a machine is suspected"


@dataclass(frozen=True)
class Judgement:
    """verdict, why in the words of the log (empty: nothing is said), and whether the loss leapt."""

    verdict: Verdict
    done: str = ""
    is_spike: bool = False


def judge_step(
    loss: float, is_finite: bool, is_machine: bool, state: RunState, settings: TrainerConfig
) -> Judgement:
    """What becomes of the step that follows `state`; the same on all ranks.

    is_machine: computed twice, it was bad twice, with other bits.
    """
    if not is_finite:
        if is_machine:
            return Judgement(Verdict.SUSPECT, "nothing was updated")
        row = state.bad_steps_in_a_row + 1
        if row < settings.max_bad_steps:
            return Judgement(Verdict.SKIP, f"nothing was updated ({row} in a row)")
        return _escalated(settings.on_bad_steps == "rollback", state, settings, False)
    if not is_spike(loss, state.recent_losses, settings.spike_deviations):
        return Judgement(Verdict.UPDATE)
    leapt = f"a spike, more than {settings.spike_deviations:g} deviations above the recent losses"
    if settings.on_spike == "warn":
        return Judgement(Verdict.UPDATE, f"{leapt}; updated all the same", is_spike=True)
    if settings.on_spike == "skip":
        return Judgement(Verdict.SKIP, f"{leapt}; nothing was updated", is_spike=True)
    return _escalated(True, state, settings, True)


def _escalated(rolls_back: bool, state: RunState, settings: TrainerConfig, is_spike: bool) -> Judgement:
    if not rolls_back:
        return Judgement(Verdict.STOP, "nothing was updated", is_spike)
    if state.rollbacks < settings.max_rollbacks:
        done = f"nothing was updated; rollback {state.rollbacks + 1} of {settings.max_rollbacks}"
        return Judgement(Verdict.ROLL_BACK, done, is_spike)
    done = f"nothing was updated, after {state.rollbacks} rollbacks (trainer.max_rollbacks)"
    return Judgement(Verdict.STOP, done, is_spike)


def after_step(
    state: RunState, judgement: Judgement, is_finite: bool, loss: float, cursor: int, settings: TrainerConfig
) -> RunState:
    """The state after a step that is updated or skipped. cursor: place of the order that comes next."""
    skipped = judgement.verdict is Verdict.SKIP
    row = 0 if is_finite else state.bad_steps_in_a_row + 1
    return replace(
        state,
        iteration=state.iteration + 1,
        consumed_samples=cursor,
        consumed_tokens=state.consumed_tokens + settings.global_batch_size * settings.seq_length,
        skipped_steps=state.skipped_steps + skipped,
        loss_spikes=state.loss_spikes + judgement.is_spike,
        bad_steps_in_a_row=row,
        bad_samples_from=state.consumed_samples if row == 1 else state.bad_samples_from if row else 0,
        recent_losses=with_loss(state, loss, settings) if is_finite else state.recent_losses,
    )


@dataclass(frozen=True)
class Back:
    """Where a rollback goes: before iteration `before`, leaving out places [start, stop) of the order.

    rather: before this iteration, if there is a checkpoint so old; 0: no matter.
    """

    before: int
    start: int
    stop: int
    rather: int = 0


def way_back(state: RunState, cursor: int, is_finite: bool) -> Back:
    """From the step after `state`, which would have ended at `cursor`, with the bad ones right before it.

    A run that did not get past where it was rolled back from goes further: its checkpoint may be bad already.
    """
    row = 0 if is_finite else state.bad_steps_in_a_row
    start = state.bad_samples_from if row else state.consumed_samples
    before = state.iteration + 1 - row
    rather = state.rolled_back_to if before <= state.rolled_back_from else 0
    return Back(before, start, cursor, rather)


def rolled_back(found: RunState, left: RunState, back: Back) -> RunState:
    """The state to go on from: that of a checkpoint `found`, and what the run has learnt since."""
    ranges = _joined([*left.skipped_samples, (back.start, back.stop)])
    return replace(
        found, skipped_samples=ranges, rollbacks=left.rollbacks + 1, rolled_back_from=back.before,
        rolled_back_to=found.iteration, wandb_run_id=left.wandb_run_id, data_key=left.data_key,
    )  # fmt: skip


def _joined(ranges: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """The same places, in ascending ranges that do not touch."""
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return tuple(joined)
