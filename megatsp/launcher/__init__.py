"""Local ranks: forked from one process, watched, started again; and what a rank owes its launcher.

Every rank is an ordinary process in a session of its own: a terminal's signal reaches the launcher alone, and
a scheduler's may reach all of them, which changes nothing. The launcher passes the first SIGINT, SIGTERM or
SIGUSR1 on, as a request to finish the step and save, and keeps watching; a second SIGINT or SIGTERM kills. A
rank that dies takes the others down at once, by SIGKILL and with whatever they started: they may be stuck in
a collective, and a SIGTERM would mean something else to them. A rank dies with its launcher, however that
one ends.

Ranks that resume by themselves (`Restarts`) are then started again, after a pause that doubles each time, up
to a limit of restarts in a row that bring no new checkpoint. Not started again: after success (0), a user's
mistake (2), a last checkpoint that could not be written (74), an end in good order (75, which is the job's
status then), suspected hardware (77), Ctrl-C (130), or the same exception twice in a row. The cause of each
failure is shown, alone and in full.
"""

from megatsp.exit_status import INTERRUPTED, REQUEUE, USER_ERROR
from megatsp.launcher.fork import STORE, become_rank
from megatsp.launcher.local import launch_local
from megatsp.launcher.outcome import ATTEMPT_FOLDER
from megatsp.launcher.rank import LAUNCHER_PID, is_users, run_rank
from megatsp.launcher.restarts import Restarts
from megatsp.launcher.signals import requeued

__all__ = [
    "ATTEMPT_FOLDER",
    "INTERRUPTED",
    "LAUNCHER_PID",
    "REQUEUE",
    "STORE",
    "USER_ERROR",
    "Restarts",
    "become_rank",
    "is_users",
    "launch_local",
    "requeued",
    "run_rank",
]
