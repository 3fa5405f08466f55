"""Whether and when ranks that failed are started again."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from megatsp.launcher.failures import Failure, kind

_LONGEST_S = 300.0


@dataclass(frozen=True)
class Restarts:
    """How often ranks that resume by themselves are started again.

    limit: in a row, without a new checkpoint. backoff_s: the pause before the first of them; it doubles
    each time, up to 300 s. newest: the iteration of the newest checkpoint, or -1; must not raise.
    """

    limit: int
    backoff_s: float
    newest: Callable[[], int]


class Count:
    """The restarts since the last new checkpoint."""

    def __init__(self, restarts: Restarts) -> None:
        self._restarts = restarts
        self._newest = restarts.newest()
        self._done = 0
        self._raised = ""  # by the failure before this one, if it was an exception

    def pause_s(self, cause: Failure) -> float | None:
        """Seconds until the ranks start again; None if they do not. Says so on stderr."""
        if (newest := self._restarts.newest()) > self._newest:
            self._done, self._raised = 0, ""
        self._newest = newest  # perhaps an older one, after a rollback
        before, self._raised = self._raised, kind(cause.headline) if cause.detail else ""
        limit = self._restarts.limit
        if not cause.may_pass or not limit:
            return None
        if before and before == self._raised:
            print(
                "megatsp: not started again: the same error twice in a row, without a new checkpoint between",
                file=sys.stderr,
            )
            return None
        if self._done == limit:
            print(
                f"megatsp: not started again: {limit} restarts in a row brought no new checkpoint "
                "(launch.max_restarts)",
                file=sys.stderr,
            )
            return None
        pause_s = min(_LONGEST_S, self._restarts.backoff_s * 2.0**self._done)
        self._done += 1
        print(
            f"megatsp: {time.strftime('%H:%M:%S')}: rank {cause.rank} {_brief(cause)}: all ranks start again "
            f"in {pause_s:g} s (restart {self._done} of {limit} without a new checkpoint)",
            file=sys.stderr,
            flush=True,
        )
        return pause_s


def _brief(cause: Failure) -> str:
    line = cause.headline.splitlines()[0]
    return f"failed ({line})" if cause.detail else line
