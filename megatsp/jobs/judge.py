"""What comes after an attempt of a job: a pure function of how it ended, and of the attempts before it.

how it ended                                   what follows
every rank with 0, and rank 0 says so          done
Slurm has requeued or ended the job itself     lost
cancelled; a user's mistake; a failed save     stop
in good order, as asked or by its own limit    requeue; stop, if two time limits in a row got nowhere
a node is lost, unfit or suspected             without it: again on spare nodes, or else requeue
a first preflight leaves too few nodes         stop
any other failure                              again; stop, if it is the last one's and got nowhere

Got nowhere: no new checkpoint. `again` starts in the same allocation; requeue gives it back and waits for
another.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatsp.exit_status import FAILURE, HARDWARE, INTERRUPTED, NOT_SAVED, REQUEUE, USER_ERROR
from megatsp.jobs.attempts import Attempt
from megatsp.launcher.failures import Failure, kind

_FINAL = {
    USER_ERROR: "a mistake that another attempt would repeat",
    NOT_SAVED: "the last checkpoint could not be written: make room before you start again",
    INTERRUPTED: "it was interrupted",
}
# Slurm's words for a job's state.
CANCELLED = "CANCELLED"
ITS_OWN = ("RUNNING", "COMPLETING", "TIMEOUT", "")  # in which the job may still say what comes next


@dataclass(frozen=True)
class Limits:
    """launch.nodes, launch.max_restarts, restart_backoff_s and launch.slurm.max_requeues.

    has_own: whether the ranks end by trainer.exit_duration_in_mins.
    """

    nodes: int
    restarts: int
    backoff_s: float
    requeues: int
    has_own: bool = False


@dataclass(frozen=True)
class End:
    """How an attempt ended.

    status: of the step, or of what failed before it. has_run: what the job is for was started. is_complete:
    it said that all is done. outcomes: of its ranks, the cause first. said: what srun said of its tasks, the
    cause first, for ranks that could say nothing. alone: the node whose tasks ended badly by themselves, if
    it was one only; was_killed: by a signal. asked: the signal by which Slurm asked it to end, or "". state:
    of the job, as Slurm calls it. down: nodes that it ran on and that are lost, or on which no task started.
    unfit: those that the preflight refused, and spare ones that are lost. iteration: of the newest
    checkpoint.
    """

    status: int
    has_run: bool
    is_complete: bool
    outcomes: Sequence[Failure]
    said: Sequence[str]
    alone: str
    asked: str
    state: str
    is_cancelled: bool
    down: Sequence[str]
    unfit: Sequence[str]
    iteration: int
    was_killed: bool = False


@dataclass(frozen=True)
class Verdict:
    """What follows an attempt.

    action: done, stop, again, requeue or lost. why: for the job's log. cause: what failed, in a line, or "".
    status: of the job, if it stops. pause_s: before the next attempt in this allocation. away: nodes that no
    later attempt may use.
    """

    action: str
    why: str
    cause: str = ""
    status: int = 0
    pause_s: float = 0.0
    away: tuple[str, ...] = ()


def judge(end: End, before: Sequence[Attempt], now: Attempt, limits: Limits) -> Verdict:
    """What comes after the attempt `now`, which `end` ended. before: the job's attempts before it, closed."""
    failed = [outcome for outcome in end.outcomes if outcome.status != REQUEUE]
    in_order = any(outcome.status == REQUEUE for outcome in end.outcomes) and not failed
    if end.is_cancelled or end.state == CANCELLED:
        return Verdict("stop", "the job was cancelled", status=INTERRUPTED)
    cause = _cause(end, failed)
    if end.state not in ITS_OWN:
        down = tuple(name for name in end.down if name in now.nodes)
        return Verdict("lost", f"Slurm has taken the job away ({end.state})", cause, away=down)
    # srun may say 0 where its own node is lost.
    is_whole = not end.outcomes and not end.down and not end.said
    if end.status == 0 and end.is_complete and is_whole:
        return Verdict("done", "every rank ended with 0")
    has_saved = end.iteration > now.iteration_before
    status = failed[0].status if failed else end.status or FAILURE
    if failed and status in _FINAL:
        return Verdict("stop", _FINAL[status], cause, status)
    if not failed and not end.down and end.status == USER_ERROR:
        return Verdict("stop", _FINAL[USER_ERROR], cause, status)

    silent = _died_silently(end, failed)
    # What others raise where a rank was killed accuses the wrong ones.
    accused = {one.host for one in failed if one.status == HARDWARE} if not silent else set()
    known = {*end.down, *end.unfit, *accused}
    away = tuple(name for name in now.nodes if name in known | silent)
    too_few = len(now.nodes) - len(away) < limits.nodes
    is_first_preflight = not end.has_run and not end.down and not end.asked and not before
    if is_first_preflight and ((not failed and status == HARDWARE) or (too_few and accused | silent)):
        blames = away or end.unfit
        why = (
            "the preflight found too few nodes that are fit" if blames else "the preflight refuses its nodes"
        )
        return Verdict("stop", f"{why}; not {', '.join(away)}" if away else why, cause, HARDWARE, away=away)
    if in_order or (end.asked and not end.down):
        # A step that ends early because it was asked to has not failed.
        return _after_good_order(end, before, now, limits, has_saved, cause if end.has_run else "")

    gone = f"without {', '.join(away)}" if away else ""
    last = before[-1] if before else None
    same = last is not None and kind(last.cause) == kind(cause)
    # Two that die alike in silence are no matter of nodes.
    if last and same and not has_saved and not last.has_saved and not known & {*now.nodes}:
        return Verdict("stop", "the same failure twice in a row, without a new checkpoint", cause, status)
    in_a_row = _in_a_row(before) if not has_saved else 0
    if in_a_row >= limits.restarts:
        why = f"{in_a_row} restarts in a row brought no new checkpoint (launch.max_restarts)"
        return Verdict("stop", why, cause, status)
    if too_few:
        return _requeue(f"{gone}: too few of its nodes are left", now, limits, cause, status, away)
    pause_s = min(300.0, limits.backoff_s * 2.0**in_a_row)
    why = f"it starts again {gone + ' ' if gone else ''}in {pause_s:g} s"
    return Verdict("again", why, cause, status, pause_s, away)


def _died_silently(end: End, failed: Sequence[Failure]) -> set[str]:
    """The node on which a preflight died before it could say anything, if it was one."""
    others_know = failed or end.status == HARDWARE
    return {end.alone} - {""} if not end.has_run and (end.was_killed or not others_know) else set()


def _after_good_order(
    end: End, before: Sequence[Attempt], now: Attempt, limits: Limits, has_saved: bool, cause: str
) -> Verdict:
    last = before[-1] if before else None
    if is_time_limit(end.asked, limits) and not has_saved and last and last.was_cut_short:
        why = "two attempts in a row had to end before their first save: the time limit is too short"
        return Verdict("stop", why, cause, REQUEUE)
    asked = f"Slurm asked it to end ({end.asked})" if end.asked else "its ranks were to end"
    return _requeue(asked, now, limits, cause, REQUEUE, ())


def is_time_limit(asked: str, limits: Limits) -> bool:
    """Whether ranks that end in good order do so for the lack of time, and not for a preemption.

    asked: by which signal the script was asked; of a preemption only the ranks may hear.
    """
    return asked == "USR1" or (not asked and limits.has_own)


def _requeue(
    why: str, now: Attempt, limits: Limits, cause: str, status: int, away: tuple[str, ...]
) -> Verdict:
    if now.restart >= limits.requeues:
        limit = f"it was requeued {now.restart} times (launch.slurm.max_requeues)"
        return Verdict("stop", f"{why}, but {limit}", cause, status, away=away)
    return Verdict("requeue", why, cause, status, away=away)


def _cause(end: End, failed: Sequence[Failure]) -> str:
    """What failed, in a line."""
    if end.down:
        return f"lost {', '.join(end.down)}"
    if end.was_killed and not end.has_run:
        return end.said[0]
    if failed:
        return f"rank {failed[0].rank}: {failed[0].headline.splitlines()[0]}"
    if end.unfit and end.status == HARDWARE:
        return f"the preflight refused {', '.join(end.unfit)}"
    if end.said:
        return end.said[0]
    if end.status == 0 and end.has_run and not end.is_complete and not end.asked and not end.outcomes:
        return "no rank says that all is done"
    return f"no rank says why it ended; exit status {end.status}" if end.status else ""


def _in_a_row(before: Sequence[Attempt]) -> int:
    """Restarts in this allocation since the last new checkpoint."""
    count = 0
    for attempt in reversed(before):
        if attempt.action != "again" or attempt.has_saved:
            break
        count += 1
    return count
