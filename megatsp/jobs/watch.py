"""`megatsp launch status | logs | cancel`: how a run's jobs are doing, what they say, and how to end them."""

import json
import shlex
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from megatsp.checkpoint.paths import LATEST, read_pointer
from megatsp.exit_status import REQUEUE, USER_ERROR
from megatsp.jobs.attempt import CANCEL
from megatsp.jobs.attempts import Attempt, read_attempts
from megatsp.jobs.attempts import folder_of as attempt_folder
from megatsp.jobs.find import ask, folder_of, jobs_of, run_of, scancel, tasks_of
from megatsp.launcher.failures import Failure
from megatsp.launcher.outcome import read_outcomes

_OVER = (
    "", "COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE",
    "PREEMPTED",
)  # fmt: skip


def status(what: str) -> str:
    """All jobs of a run, the attempts of the last one, and how far the run is. what: run folder or job.

    Raises:
        ValueError: there is no such run or job, or no Slurm here.
    """
    run, number = run_of(what)
    lines = [str(run)]
    for job in jobs_of(run):
        known = ask(job)
        lines.append(
            "  ".join(filter(None, (f"job {job}", known.state or "over", known.nodes, known.reason)))
        )
        if job != number:
            continue
        for attempt in read_attempts(folder_of(run, job)):
            lines.append(f"  {_row(attempt, known.state in _OVER)}")
        if found := first_cause(run, job):
            lines.append(f"  {_named(*found)}: {found[1].headline.splitlines()[0]}")
    lines += _progress(run)
    return "\n".join(lines)


def logs(what: str, rank: int | None, attempt: int | None, num_lines: int) -> str:
    """The traceback of the first rank that failed, if one did, then the end of a rank's log.

    what: run folder or job. rank: None for rank 0. attempt: None for the last one. num_lines: 0 for all.

    Raises:
        ValueError: there is no such run, job, attempt or log.
    """
    run, number = run_of(what)
    folder = folder_of(run, number)
    path = log_path(run, number, rank, attempt)
    parts = []
    found = first_cause(run, number, attempt)
    if found is not None and rank is None:
        parts.append(f"==> {_named(*found)} <==\n{_full(found[1])}")
    parts.append(f"==> {path} <==\n{_tail(path, num_lines)}")
    job_log = run / "slurm" / f"{folder.name}.log"
    if rank is None and job_log.is_file() and job_log != path:
        parts.append(f"==> {job_log} <==\n{_tail(job_log, num_lines)}")
    return "\n\n".join(parts)


def log_path(run: Path, number: str, rank: int | None, attempt: int | None) -> Path:
    """The log of a rank of an attempt; of rank 0 and the last attempt by default, or the job's if none began.

    Raises:
        ValueError: there is no such attempt or log.
    """
    folder = folder_of(run, number)
    attempts = read_attempts(folder)
    wanted = attempt if attempt is not None else len(attempts) - 1
    path = attempt_folder(folder, wanted) / f"rank_{rank or 0:05d}.log"
    if path.is_file():
        return path
    if attempt is not None and attempt >= len(attempts):
        raise ValueError(f"--attempt {attempt}: job {number} has made {len(attempts)} (0 is the first)")
    if rank is not None:
        there = sorted(path.parent.glob("rank_*.log"))
        known = (
            f"ranks {int(there[0].stem[5:])} to {int(there[-1].stem[5:])} have one" if there else "none has"
        )
        raise ValueError(f"--rank {rank}: it has no log in {path.parent}; {known}")
    job_log = run / "slurm" / f"{folder.name}.log"
    if not job_log.is_file():
        shown = shlex.quote(str(run))
        raise ValueError(f"job {number} has not begun: it has no log yet (megatsp launch status {shown})")
    return job_log


def follow(what: str, rank: int | None) -> Iterator[str]:
    """A rank's log as it grows, from attempt to attempt, until the job is over."""
    run, number = run_of(what)
    path, position = None, 0
    while True:
        is_over = ask(number).state in _OVER
        try:
            newest = log_path(run, number, rank, None)
        except ValueError:
            if is_over:
                raise
            newest = None
        if newest != path:
            path, position = newest, 0
            yield f"==> {path} <==\n"
        if path is not None:
            with path.open(errors="replace") as file:
                file.seek(position)
                yield file.read()
                position = file.tell()
        if is_over:
            return
        time.sleep(1)


def cancel(what: str, now: bool) -> str:
    """Ends a job for good: after its step and a save, or at once. what: run folder or job, or a whole array.

    Raises:
        ValueError: there is no such run or job, it is over, or Slurm refuses.
    """
    is_number = what.isdecimal() and not Path(what).is_dir()
    if is_number and (tasks := [task for task in tasks_of(what) if ask(task).state not in _OVER]):
        return "\n".join(_cancel_waiting(task) if "[" in task else cancel(task, now) for task in tasks)
    run, number = run_of(what)
    known = ask(number)
    if known.state in _OVER:
        raise ValueError(f"job {number} is over ({known.state or 'Slurm has forgotten it'})")
    running = known.state == "RUNNING" and not now
    if running:
        folder = run / "slurm" / f"job_{known.number}"
        folder.mkdir(exist_ok=True)
        (folder / CANCEL).touch()
    _scancel(number, *(("--batch", "--signal=USR1") if running else ()))
    if running:
        said = f"job {number} saves and ends; at once: megatsp launch cancel --now {number}"
    else:
        said = f"job {number} is cancelled"
    others = [job for job in jobs_of(run) if job != number and ask(job).state not in _OVER]
    return f"{said}\nstill there, of the same run: job {', '.join(others)}" if others else said


def _cancel_waiting(tasks: str) -> str:
    """Of an array's tasks that wait together, which have no folder yet."""
    _scancel(tasks)
    return f"job {tasks} is cancelled"


def _scancel(number: str, *options: str) -> None:
    result = scancel(*options, number)
    if result.returncode:
        raise ValueError(f"Slurm did not cancel job {number}:\n{result.stderr.strip()}")


def first_cause(run: Path, number: str, attempt: int | None = None) -> tuple[int, Failure] | None:
    """The failure that explains the others, and its attempt: the given one, or the last one that failed.

    None if it did not fail, or if all is done by now.
    """
    folder = folder_of(run, number)
    attempts = read_attempts(folder)
    if attempt is None and attempts and attempts[-1].action == "done":
        return None
    for wanted in range(len(attempts) - 1, -1, -1) if attempt is None else [attempt]:
        for failure in read_outcomes(attempt_folder(folder, wanted)):
            if failure.status != REQUEUE:
                return wanted, failure
    return None


def _named(attempt: int, cause: Failure) -> str:
    return f"first to fail, in attempt {attempt}: rank {cause.rank} on {cause.host}"


def _full(cause: Failure) -> str:
    """What to show of it: of a user's mistake the message alone."""
    return cause.headline if cause.status == USER_ERROR else cause.detail.rstrip() or cause.headline


def _tail(path: Path, num_lines: int) -> str:
    with path.open(errors="replace") as file:
        return "".join(deque(file, num_lines) if num_lines else file).rstrip()


def _row(attempt: Attempt, is_over: bool) -> str:
    since = time.strftime("%m-%d %H:%M:%S", time.localtime(attempt.started))
    parts = [f"attempt {attempt.attempt}", since]
    if attempt.ended or not is_over:
        parts.append(f"{(attempt.ended or time.time()) - attempt.started:.0f} s")
    parts.append(f"{len(attempt.nodes)} nodes")
    if attempt.is_open:
        parts.append("ended with its job, by Slurm" if is_over else "running")
    else:
        parts.append(f"checkpoint {max(0, attempt.iteration)}")
        why = "" if attempt.action == "done" else attempt.why
        parts.append(": ".join(filter(None, (attempt.cause, attempt.action, why))))
    if attempt.away:
        parts.append(f"(kept off: {', '.join(attempt.away)})")
    return "  ".join(parts)


def _progress(run: Path) -> Iterator[str]:
    saved = read_pointer(run / "checkpoints" / LATEST)
    if saved is not None:
        yield f"checkpoint: iteration {saved}"
    metrics = run / "metrics.jsonl"
    if not metrics.is_file():
        return
    entries = [_entry(line) for line in _tail(metrics, 50).splitlines()]
    last = next((entry for entry in reversed(entries) if entry.get("lm loss") is not None), None)
    if last is not None:
        age = time.time() - metrics.stat().st_mtime
        speed = f"{last['tokens/s/gpu']:,.0f} tokens/s/gpu"
        loss = f"lm loss {last['lm loss']:.4f}"
        yield f"iteration {last['iteration']}: {loss}, {speed}, written {age:.0f} s ago"


def _entry(line: str) -> dict:
    try:
        entry = json.loads(line)
    except ValueError:  # the last line, while it is written
        return {}
    return entry if isinstance(entry, dict) else {}
