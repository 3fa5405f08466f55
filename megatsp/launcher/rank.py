"""What a rank owes its launcher: its error, its exit status, and an end with it."""

import ctypes
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from megatsp.exit_status import FAILURE, REQUEUE, USER_ERROR
from megatsp.launcher.failures import Failure, ended
from megatsp.launcher.outcome import ATTEMPT_FOLDER, write_done, write_outcome

LAUNCHER_PID = "MEGATSP_LAUNCHER_PID"  # in a rank's environment: its launcher
SERVER_PID = "MEGATSP_SERVER_PID"  # and the process that it was forked from, if it was
_PR_SET_PDEATHSIG = 1


def run_rank(work: Callable[[], int]) -> NoReturn:
    """Runs `work` as a rank and ends the process with the status that it returns.

    An exception goes to the launcher, torch's or ours, which shows it. The process ends without the
    interpreter's teardown: after a failure that can wait for ranks that wait for this one, and after
    success a gloo thread that still lets go of a tensor then aborts it (seen with torch 2.13).
    """
    ours = _die_with_launcher()
    attempt = os.environ.get(ATTEMPT_FOLDER)
    if attempt:
        _log_to(Path(attempt))
    from torch.distributed.elastic.multiprocessing.errors import record

    failure: Failure | None = None
    rank = int(os.environ.get("RANK", "0"))
    try:
        status = record(work)() or 0
        failure = ended(rank, status) if status else None
    except Exception as error:
        status = USER_ERROR if is_users(error) else FAILURE
        said = str(error) if status == USER_ERROR else ""
        headline = said or f"{type(error).__name__}: {error}"
        failure = Failure(rank, status, headline, "".join(traceback.format_exception(error)))
        if ours and not attempt:
            pass  # the launcher shows it
        elif status == USER_ERROR:
            print(f"megatsp: error: {error}", file=sys.stderr)
        else:
            traceback.print_exception(error)
    if attempt and rank == 0 and failure is None:
        write_done(Path(attempt))
    if attempt and failure is not None:
        is_written = write_outcome(Path(attempt), failure)
        if status == REQUEUE and is_written:  # srun would kill the others, who are about to say the same
            status = 0
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _log_to(folder: Path) -> None:
    """Sends what this rank says, and its libraries, to a file of its own."""
    name = folder / f"rank_{int(os.environ.get('RANK', '0')):05d}.log"
    try:
        file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError as error:
        print(f"megatsp: {name} cannot be written: {error.strerror}; this rank logs here", flush=True)
        return
    sys.stdout.flush()
    sys.stderr.flush()
    for stream in (1, 2):
        os.dup2(file, stream)
    os.close(file)


def is_users(error: BaseException) -> bool:
    """Whether an error says what a user did: a ValueError that our own code raised."""
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    module = trace.tb_frame.f_globals.get("__name__", "") if trace else ""
    kind = type(error)  # not those of libraries that are ValueErrors too
    ours = kind is ValueError or (issubclass(kind, ValueError) and kind.__module__.startswith("megatsp."))
    return ours and module.partition(".")[0] == "megatsp"


def _die_with_launcher() -> bool:
    """Asks the kernel to kill this rank when our launcher dies. False under another launcher."""
    launcher = os.environ.get(LAUNCHER_PID)
    if not launcher:
        return False
    die_with(int(os.environ.get(SERVER_PID, launcher)))
    return True


def die_with(parent: int) -> None:
    """Asks the kernel to kill this process when its parent dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before we asked
        os._exit(1)
