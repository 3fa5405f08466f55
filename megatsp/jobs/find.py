"""Which jobs a run has, and what Slurm says of them."""

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_WORD = re.compile(r"(\w+)=(.*?)(?= [\w/:]+=|\s*$)")  # of `scontrol show job`; a path may hold spaces
_PATIENCE_S = 120
_SCRIPT = re.compile(r"job_(\d+(?:_\d+)?)\.sh")


@dataclass(frozen=True)
class Known:
    """What Slurm knows of a job; state is "" if it has forgotten it."""

    state: str = ""
    reason: str = ""
    nodes: str = ""
    number: str = ""  # its own; of an array's task another than the one that users write
    log: str = ""
    task: str = ""  # 123_4, as users write it, of one task of an array


def jobs_of(run: Path) -> list[str]:
    """The numbers of the jobs that were submitted for a run, oldest first; of an array's task 123_4.

    Those of plain sbatch left no script before they began: their folders count.

    Raises:
        ValueError: the run has none.
    """
    names = {path.name for path in (run / "slurm").glob("job_*.sh")}
    found = {match[1] for name in names if (match := _SCRIPT.fullmatch(name))}
    if not any("_" in number for number in found):  # the folder of an array's task has another number
        folders = (path.name.removeprefix("job_") for path in (run / "slurm").glob("job_*/"))
        found |= {_written(number) for number in folders if number.isdecimal()}
    if not found:
        raise ValueError(f"{run} has no jobs: `megatsp launch slurm` submits them; give the run's folder")
    return sorted(found, key=lambda number: [int(part) for part in number.split("_")])


def run_of(what: str) -> tuple[Path, str]:
    """A run's folder and the number of one of its jobs, from a folder or a job's number.

    Of a folder's jobs it is the one that runs, or else the last one that has begun, or else the last one.

    Raises:
        ValueError: there is no such run or job.
    """
    if not re.fullmatch(r"\d+(_\d+)?", what) or Path(what).is_dir():
        run = Path(what).absolute()
        jobs = jobs_of(run)
        states = {job: ask(job).state if shutil.which("scontrol") else "" for job in jobs}
        running = [job for job in jobs if states[job] in ("RUNNING", "COMPLETING")]
        begun = [job for job in jobs if folder_of(run, job).is_dir()]
        return run, (running or begun or jobs)[-1]
    if tasks := tasks_of(what):
        given = ", ".join(tasks[:4]) + (", ..." if len(tasks) > 4 else "")
        raise ValueError(f"job {what} is an array: give one of its tasks, {given}")
    known = ask(what)
    if not known.log:
        raise ValueError(f"Slurm knows no job {what} (any more): give the run's folder")
    run = Path(known.log).parents[1]
    if not (run / "slurm").is_dir():
        raise ValueError(f"job {what} is none that `megatsp launch slurm` submitted: its log is {known.log}")
    jobs = jobs_of(run)
    return run, known.task if known.task in jobs else what


def ask(number: str) -> Known:
    """What Slurm says of a job now.

    Raises:
        ValueError: there is no Slurm here, or it does not answer.
    """
    found = _shown(number)
    if not found:
        return Known()
    # The number of an array shows all its tasks, and is the own number of one of them.
    words = next((words for words in found if words.get("JobId") == number), found[0])
    reason = words.get("Reason", "")
    return Known(
        words.get("JobState", ""),
        "" if reason in ("None", "(null)") else reason,
        words.get("NodeList", "").replace("(null)", ""),
        words.get("JobId", ""),
        words.get("StdOut", ""),
        _task(words),
    )


def tasks_of(number: str) -> list[str]:
    """The tasks of an array by their numbers, 123_4, or, of those that wait together, 123_[5-9]; else none.

    The own number of a task is that task, and no array, unless it is the array's number too.

    Raises:
        ValueError: there is no Slurm here, or it does not answer.
    """
    if "_" in number:
        return []
    tasks = [_task(words) for words in _shown(number) if words.get("ArrayJobId") == number]
    return sorted(tasks, key=lambda task: (len(task), task))


def _task(words: dict[str, str]) -> str:
    """What users call a record's task of an array, 123_4, or those that wait together; "" of other jobs."""
    task = words.get("ArrayTaskId", "").partition("%")[0]
    return f"{words['ArrayJobId']}_{task if task.isdecimal() else f'[{task}]'}" if task else ""


def _written(number: str) -> str:
    """A job's own number as users write it: of an array's task 123_4, while Slurm knows it."""
    known = ask(number) if shutil.which("scontrol") else Known()
    is_one = known.number == number and re.fullmatch(r"\d+_\d+", known.task)
    return known.task if is_one else number


def folder_of(run: Path, number: str) -> Path:
    """The folder of a job; an array's task has one by its own number, which its log's first line says."""
    if "_" not in number:
        return run / "slurm" / f"job_{number}"
    if shutil.which("scontrol") and (own := ask(number).number):
        return run / "slurm" / f"job_{own}"
    folders = sorted((run / "slurm").glob("job_*/"), key=lambda path: path.stat().st_mtime)
    return folders[-1] if folders else run / "slurm" / f"job_{number}"


def _shown(number: str) -> list[dict[str, str]]:
    """What `scontrol show job` says, a record a job; none if Slurm has forgotten it."""
    result = scontrol("show", "job", number, "--oneliner")
    if result.returncode:
        if "Invalid job id" in result.stderr:
            return []
        raise ValueError(f"Slurm does not answer:\n{result.stderr.strip()}")
    return [dict(_WORD.findall(line)) for line in result.stdout.splitlines() if line.strip()]


def scontrol(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Raises ValueError if there is no Slurm here, or it does not answer."""
    return _slurm("scontrol", arguments)


def scancel(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Raises ValueError if there is no Slurm here, or it does not answer."""
    return _slurm("scancel", arguments)


def _slurm(name: str, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    path = shutil.which(name)
    if path is None:
        raise ValueError(f"{name} is not on the PATH: use a login node of the cluster")
    try:
        return subprocess.run([path, *arguments], capture_output=True, text=True, timeout=_PATIENCE_S)
    except subprocess.TimeoutExpired:
        raise ValueError(f"Slurm does not answer: {name} took longer than {_PATIENCE_S} s") from None
