"""`python -m megatsp.jobs.attempt begin | end`: what a job's script asks before and after each attempt.

The answer is one line on stdout for the script; what people are to read goes to stderr, the job's log.
Starts without torch: it runs on the first node while the others wait.
"""

import re
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from megatsp.checkpoint.paths import LATEST, read_pointer
from megatsp.exit_status import INTERRUPTED, REQUEUE, USER_ERROR
from megatsp.jobs.attempts import Attempt, closed, folder_of, nodes_away, read_attempts, write_attempts
from megatsp.jobs.judge import End, Limits, is_time_limit, judge
from megatsp.launcher.outcome import is_done, read_outcomes
from megatsp.parser import Parser
from megatsp.preflight.files import MEASURED, NODES, ROLL_CALL, read_names, read_report
from megatsp.preflight.node_names import expand
from megatsp.training.events import Event, append_event

_TASK_ENDED = re.compile(r"(?:srun|slurmstepd)(?:-\S+)?: error: (\S+: tasks? .*|Node failure.*)")
_LOST = re.compile(r".*?error: (?:Task launch for \S+ failed on node (\S+?):|Node failure on (\S+))")
# From any of these on, tasks end because others did.
_ENDS_OTHERS = ("Terminating StepId", "Job step aborted", "CANCELLED AT", "Node failure")
CANCEL = "cancel"  # the file in a job's folder that says that it is not to come back


def main(arguments: Sequence[str]) -> int:
    given = _parse(arguments)
    print(*(_begin(given) if given.moment == "begin" else _end(given)))
    return 0


def _begin(given: Namespace) -> tuple[str, str]:
    """("go", FOLDER of the new attempt); or ("requeue", NODES to keep off, or "-"); or ("stop", STATUS)."""
    given.job.mkdir(parents=True, exist_ok=True)
    attempts = read_attempts(given.job)
    down = given.down.split()
    if attempts and attempts[-1].is_open:  # it could not write down its own end
        lost = tuple(name for name in attempts[-1].nodes if name in down)
        cause = f"lost {', '.join(lost)}" if lost else "the job was taken away"
        changes = {"ended": time.time(), "iteration": _newest(given), "cause": cause, "away": lost}
        attempts = closed(attempts, action="lost", **changes)
        _say(f"attempt {attempts[-1].attempt} has no end: {cause}")
    if (given.job / CANCEL).exists():
        _say(f"the job was cancelled; to let it go on, remove {given.job / CANCEL}")
        write_attempts(given.job, attempts)
        return "stop", str(INTERRUPTED)
    if given.restart > given.requeues:  # by Slurm itself
        _say(f"the job was requeued {given.restart} times (launch.slurm.max_requeues): it stops")
        write_attempts(given.job, attempts)
        return "stop", str(REQUEUE)
    away = nodes_away(attempts)
    live = [name for name in given.allocated.split() if name not in {*down, *away}]
    if len(live) < given.nodes:
        write_attempts(given.job, attempts)
        useless = [name for name in given.allocated.split() if name not in live]
        why = f"{len(live)} of {given.nodes} nodes can be used; not {', '.join(useless)}"
        if given.restart >= given.requeues:
            _say(f"{why}; it was requeued {given.restart} times (launch.slurm.max_requeues): it stops")
            return "stop", "1"
        _say(f"{why}: requeued")
        return "requeue", _listed((*away, *useless))
    new = Attempt(
        len(attempts), given.number, given.restart, tuple(live), time.time(), iteration_before=_newest(given)
    )
    folder = folder_of(given.job, new.attempt)
    folder.mkdir(exist_ok=True)
    (folder / "live.txt").write_text("".join(f"{name}\n" for name in live))
    write_attempts(given.job, [*attempts, new])
    at = f"iteration {new.iteration_before}" if new.iteration_before >= 0 else "the beginning"
    _say(f"attempt {new.attempt} from {at} on {_brief(live)}")
    return "go", str(folder)


def _end(given: Namespace) -> tuple[str, str]:
    """What comes next: done, lost and stop with the job's status, again with seconds, requeue as above."""
    attempts = read_attempts(given.job)
    now = attempts[-1]
    if now.attempt != given.attempt or not now.is_open:
        _say(f"the job goes on elsewhere, with attempt {now.attempt}")
        return "lost", "0"
    folder = folder_of(given.job, now.attempt)
    probe = folder / ".probe"  # a client of NFS looks anew at a folder that it has changed
    probe.touch()
    probe.unlink()
    outcomes = read_outcomes(folder)
    words = _Words.of(folder / "srun.log")
    is_called = (folder / ROLL_CALL).is_file()  # and so all nodes can run something
    lost = {*given.down.split(), *words.lost}
    chosen = folder / NODES
    used = {*(read_names(chosen) if given.ran and chosen.is_file() else now.nodes)}
    unfit = {*_unfit(folder, now.nodes), *(lost - used)}
    end = End(
        given.status,
        given.ran,
        is_done(folder),
        outcomes,
        words.ended,
        words.alone if is_called else "",
        given.asked,
        given.state,
        is_cancelled=(given.job / CANCEL).exists(),
        down=[name for name in now.nodes if name in lost & used],
        unfit=[name for name in now.nodes if name in unfit and name not in lost & used],
        iteration=_newest(given),
        was_killed=is_called and words.was_killed,
    )
    limits = Limits(given.nodes, given.restarts, given.backoff_s, given.requeues, given.has_own_limit)
    verdict = judge(end, attempts[:-1], now, limits)
    ending = {"ended": time.time(), "iteration": end.iteration, "status": given.status}
    ending["out_of_time"] = is_time_limit(given.asked, limits)
    ending |= {"cause": verdict.cause, "action": verdict.action, "why": verdict.why, "away": verdict.away}
    attempts = closed(attempts, **ending)
    write_attempts(given.job, attempts)
    if verdict.cause:
        first = next((one for one in outcomes if verdict.cause.startswith(f"rank {one.rank}: ")), None)
        if first is not None and first.status == USER_ERROR:
            _say(f"error: {first.headline}")
        else:
            where = f" on {first.host}" if first is not None else ""
            _say(f"error: {verdict.cause}{where}\n{first.detail if first is not None else ''}".rstrip())
    _say(f"attempt {now.attempt}: {verdict.action}: {verdict.why}")
    if verdict.cause or verdict.action == "stop":
        parts = filter(None, [f"attempt {now.attempt}", verdict.cause, verdict.action, verdict.why])
        kind = "attempt failed" if verdict.cause else "job stopped"
        with suppress(OSError):  # a full disk, which the log tells of
            append_event(given.run, Event(kind, max(0, end.iteration), ": ".join(parts)))
    if verdict.action == "again":
        return "again", f"{verdict.pause_s:g}"
    if verdict.action == "requeue":
        return "requeue", _listed(nodes_away(attempts))
    return verdict.action, str(verdict.status)


def _unfit(folder: Path, nodes: Sequence[str]) -> set[str]:
    """Nodes that the roll call or the measurements refused, or that did not come to a roll call."""
    called, measured = folder / ROLL_CALL, folder / MEASURED
    unfit: set[str] = set()
    if called.is_file():
        found = read_report(called)["nodes"]
        unfit = {*nodes} - {node["node"] for node in found if not node["reasons"]}
    return unfit | {*(read_report(measured)["bad"] if measured.is_file() else ())}


@dataclass(frozen=True)
class _Words:
    """What srun said: of tasks that ended badly, first things first; of nodes that are lost.

    alone: the node whose tasks ended badly before srun ended the others, by a signal if any did (was_killed);
    "" where there were several.
    """

    ended: list[str]
    lost: set[str]
    alone: str
    was_killed: bool

    @classmethod
    def of(cls, log: Path) -> "_Words":
        lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
        own = list(takewhile(lambda line: not any(text in line for text in _ENDS_OTHERS), lines))
        first = _matched(_TASK_ENDED, own)
        killed = [text for text in first if "Exited with exit code" not in text]
        hosts = {host for text in killed or first for host in expand(text.partition(":")[0])}
        alone = hosts.pop() if len(hosts) == 1 else ""
        lost = {host for text in _matched(_LOST, lines) for host in expand(text)}
        return cls(_matched(_TASK_ENDED, lines), lost, alone, bool(alone and killed))


def _matched(pattern: re.Pattern[str], lines: Sequence[str]) -> list[str]:
    return [match[match.lastindex or 0] for line in lines if (match := pattern.match(line))]


def _newest(given: Namespace) -> int:
    iteration = read_pointer(given.run / "checkpoints" / LATEST)
    return -1 if iteration is None else iteration


def _listed(nodes: Sequence[str]) -> str:
    return ",".join(dict.fromkeys(nodes)) or "-"


def _brief(nodes: Sequence[str]) -> str:
    if len(nodes) <= 8:
        return ", ".join(nodes)
    return f"{len(nodes)} nodes: {', '.join(nodes[:4])} ... {nodes[-1]}"


def _say(text: str) -> None:
    print(f"megatsp: {time.strftime('%H:%M:%S')}: {text}", file=sys.stderr, flush=True)


def _parse(arguments: Sequence[str]) -> Namespace:
    parser = Parser("python -m megatsp.jobs.attempt")
    parser.add_argument("moment", choices=("begin", "end"))
    parser.add_argument("--job", type=Path, required=True, help="the job's folder")
    parser.add_argument("--number", type=int, required=True, help="its number")
    parser.add_argument("--run", type=Path, required=True, help="the run's folder")
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--restarts", type=int, required=True)
    parser.add_argument("--backoff-s", type=float, required=True)
    parser.add_argument("--requeues", type=int, required=True)
    parser.add_argument("--restart", type=int, default=0, help="how often the job was requeued")
    parser.add_argument("--allocated", default="", help="its nodes, spare ones included")
    parser.add_argument("--down", default="", help="nodes that Slurm has lost")
    parser.add_argument("--attempt", type=int, default=0)
    parser.add_argument("--status", type=int, default=0)
    parser.add_argument("--ran", action="store_true", help="what the job is for has run")
    parser.add_argument("--asked", default="", help="the signal by which Slurm asked it to end")
    parser.add_argument("--state", default="")
    parser.add_argument("--has-own-limit", action="store_true", help="ranks have a time limit of their own")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
