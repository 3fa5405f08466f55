"""The attempts of a job, as its folder keeps them: attempts.jsonl, one object a line."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from megatsp.checkpoint.paths import replace_text

FILE = "attempts.jsonl"


@dataclass(frozen=True)
class Attempt:
    """One start of the ranks.

    restart: how often the job had been requeued. nodes: those it could use, spare ones included.
    iteration_before, iteration: of the newest checkpoint; -1: there is none. status: the exit status of what
    ended it, -1 while it runs. cause: in words; "" if nothing failed. action: what followed: done, stop,
    again, requeue; or lost: the job itself ended. why: that followed. away: nodes that no later attempt may
    use. out_of_time: a time limit ended it. Times are of time.time().
    """

    attempt: int
    job_id: int
    restart: int
    nodes: tuple[str, ...]
    started: float
    iteration_before: int
    ended: float = 0.0
    iteration: int = -1
    status: int = -1
    cause: str = ""
    action: str = ""
    why: str = ""
    away: tuple[str, ...] = ()
    out_of_time: bool = False

    @property
    def is_open(self) -> bool:
        """Whether nothing was written down of its end."""
        return not self.action

    @property
    def has_saved(self) -> bool:
        """Whether it brought a new checkpoint."""
        return self.iteration > self.iteration_before

    @property
    def was_cut_short(self) -> bool:
        """Whether a time limit ended it before its first save."""
        return self.action == "requeue" and self.out_of_time and not self.has_saved and not self.away


def folder_of(job: Path, attempt: int) -> Path:
    return job / f"attempt_{attempt}"


def read_attempts(job: Path) -> list[Attempt]:
    """The attempts of a job's folder, oldest first.

    Raises:
        ValueError: a line is no attempt.
    """
    path = job / FILE
    found = []
    for number, line in enumerate(path.read_text().splitlines() if path.is_file() else [], start=1):
        try:
            values = json.loads(line)
            found.append(Attempt(**{**values, "nodes": (*values["nodes"],), "away": (*values["away"],)}))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}, line {number}, is no attempt of a job: remove the file") from error
    return found


def write_attempts(job: Path, attempts: list[Attempt]) -> None:
    """Replaces the file as a whole. Raises OSError."""
    replace_text(job / FILE, "".join(json.dumps(asdict(attempt)) + "\n" for attempt in attempts))


def nodes_away(attempts: list[Attempt]) -> tuple[str, ...]:
    """Every node that was put away so far, in the order in which that happened."""
    return tuple(dict.fromkeys(name for attempt in attempts for name in attempt.away))


def closed(attempts: list[Attempt], **changes: object) -> list[Attempt]:
    """The attempts with the last one's end filled in."""
    return [*attempts[:-1], replace(attempts[-1], **changes)]  # type: ignore[arg-type]
