"""Why ranks failed: what they wrote down before they ended, and how they ended."""

import json
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatsp.exit_status import FAILURE, HANG, HARDWARE, NOT_SAVED, RETRIED, USER_ERROR

_MEANINGS = {
    NOT_SAVED: "could not write the last checkpoint",
    HANG: "made no progress and ended itself",
    HARDWARE: "suspects its machine",
}


@dataclass(frozen=True)
class Failure:
    """What happened to one rank.

    status: the exit status that the launcher takes from it. detail: of an exception, the traceback.
    """

    rank: int
    status: int
    headline: str
    detail: str = ""
    was_killed: bool = False

    @property
    def may_pass(self) -> bool:
        """Whether another attempt may end differently."""
        return self.was_killed or self.status in RETRIED


def failures(codes: Mapping[int, int], folder: Path) -> list[Failure]:
    """What happened to each failed rank, the cause first.

    A rank whose peer has died fails too, and may even end sooner. So: a killed rank first (what its
    peers raise comes later), then the exceptions in the order in which they were written down, also
    those of ranks that had not ended yet.

    codes: exit codes by rank, without the ranks that the launcher ended.
    """
    killed, raised, ended = [], [], []
    for file in sorted(folder.rglob("error.json"), key=lambda file: file.stat().st_mtime_ns):
        rank, error = int(file.parent.name), json.loads(file.read_text())["message"]
        status = USER_ERROR if codes.get(rank) == USER_ERROR else FAILURE
        raised.append(Failure(rank, status, error["message"], error["extraInfo"]["py_callstack"]))
    for rank in sorted(codes.keys() - {failure.rank for failure in raised}):
        if codes[rank] >= 0:
            meaning = _MEANINGS.get(codes[rank], f"exited with status {codes[rank]}")
            ended.append(Failure(rank, codes[rank], meaning))
        else:
            headline = f"killed by {signal_name(-codes[rank])}"
            killed.append(Failure(rank, 128 - codes[rank], headline, was_killed=True))
    return [*killed, *raised, *ended]


def show(found: Sequence[Failure]) -> None:
    """Prints the cause, in full and first; of the others a line each."""
    cause, *others = found
    if cause.status == USER_ERROR:
        said = cause.headline.removeprefix("ValueError: ").removeprefix("Damaged: ")
        print(f"megatsp: error: {said}", file=sys.stderr)
        return
    print(f"megatsp: error: rank {cause.rank}: {cause.headline}\n{cause.detail}", end="", file=sys.stderr)
    for other in others:
        print(f"  then rank {other.rank}: {other.headline.splitlines()[0]}", file=sys.stderr)


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
