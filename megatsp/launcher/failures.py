"""Why ranks failed: what they wrote down before they ended, and how they ended."""

import json
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatsp.exit_status import FAILURE, HANG, HARDWARE, INTERRUPTED, NOT_SAVED, REQUEUE, RETRIED, USER_ERROR

_CHANGING = re.compile(r"0x[0-9a-f]+|\d+(?:[-,.]\d+)*", re.IGNORECASE)  # ranks, sizes, addresses
_MEANINGS = {
    NOT_SAVED: "could not write the last checkpoint",
    HANG: "made no progress and ended itself",
    HARDWARE: "suspects its machine",
    REQUEUE: "stopped in good order, to be started again",
    INTERRUPTED: "was interrupted",
}


@dataclass(frozen=True)
class Failure:
    """What happened to one rank.

    status: the exit status that the launcher takes from it. detail: of an exception, the traceback. host:
    where it ran, if others did elsewhere.
    """

    rank: int
    status: int
    headline: str
    detail: str = ""
    was_killed: bool = False
    host: str = ""

    @property
    def may_pass(self) -> bool:
        """Whether another attempt may end differently."""
        return self.was_killed or self.status in RETRIED


def failures(codes: Mapping[int, int], folder: Path, first_rank: int = 0) -> list[Failure]:
    """What happened to each failed rank of this machine, the cause first.

    codes: exit codes by the ranks' numbers here, without the ranks that the launcher ended; also ranks that
    had not ended yet may have written down an exception. first_rank: that of number 0.
    """
    found = []
    for file in sorted(folder.rglob("error.json"), key=lambda file: file.stat().st_mtime_ns):
        number, error = int(file.parent.name), json.loads(file.read_text())["message"]
        status = USER_ERROR if codes.get(number) == USER_ERROR else FAILURE
        detail = error["extraInfo"]["py_callstack"]
        found.append(Failure(first_rank + number, status, error["message"], detail))
    known = {failure.rank - first_rank for failure in found}
    found += [ended(first_rank + number, codes[number]) for number in sorted(codes.keys() - known)]
    return first_causes(found)


def ended(rank: int, code: int) -> Failure:
    """What a rank's exit code alone tells. code: not 0; negative: the signal that killed it."""
    if code < 0:
        return Failure(rank, 128 - code, f"killed by {signal_name(-code)}", was_killed=True)
    return Failure(rank, code, _MEANINGS.get(code, f"exited with status {code}"))


def first_causes(found: Sequence[Failure]) -> list[Failure]:
    """Failures in the order in which they explain each other. found: in the order in which they happened.

    A rank whose peer has died fails too, and may even end sooner. So: a killed rank first (what its peers
    raise comes later), then the exceptions, then what only ended.
    """
    return sorted(found, key=lambda failure: 0 if failure.was_killed else 1 if failure.detail else 2)


def kind(text: str) -> str:
    """What the text of a failure has in common with that of the same one of another rank, at another time."""
    return _CHANGING.sub("#", text).replace("tasks", "task")


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
