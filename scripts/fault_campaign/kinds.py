"""The faults: what is done to a run, and the state that it is left in for the checks."""

import os
import random
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fault_campaign.checks import good
from fault_campaign.job import ITERATIONS, SAVE_INTERVAL, Job, kill, processes, ranks, wait_until
from megatsp.checkpoint.manifest import MANIFEST, read_manifest
from megatsp.checkpoint.paths import LATEST, folder_of, read_pointer
from megatsp.exit_status import FAILURE, NOT_SAVED, REQUEUE, USER_ERROR


@dataclass
class Trial:
    """One run and its fault. limit_s: longest a command may take. struck: when the fault came."""

    folder: Path
    corpus: Path
    random: random.Random
    limit_s: float
    settings: tuple[str, ...]
    keep_last: int = 0  # checkpoints; 0: all
    jobs: list[Job] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    good: set[int] = field(default_factory=set)  # checkpoints that were good before or after the fault
    struck: float = 0.0
    redone_limit: int = SAVE_INTERVAL
    may_lack: bool = False  # checkpoints between the first and the last

    @property
    def checkpoints(self) -> Path:
        return self.folder / "run" / "checkpoints"

    def start(self, fault: dict[str, Any] | None = None) -> Job:
        self.jobs.append(Job(self.folder, self.corpus, self.settings, fault))
        return self.jobs[-1]

    def end(self, *allowed: int) -> int | None:
        """Waits for the job's end, which must come in time and with one of these statuses."""
        status = self.jobs[-1].end(self.limit_s)
        if status is None:
            self.problems.append(f"it did not end in {self.limit_s:g} s")
        elif status not in allowed:
            self.problems.append(f"exit status {status}, not one of {allowed}")
        if (self.folder / "struck").exists():
            self.struck = float((self.folder / "struck").read_text() or time.time())
        there = good(self.checkpoints)
        if self.good and not there:
            self.problems.append("no good checkpoint is left")
        self.good |= there
        return status

    def complete(self) -> None:
        """The same command once more, to the end."""
        self.start()
        self.end(0)

    def expect(self, text: str) -> None:
        if not any(text in job.text for job in self.jobs):
            self.problems.append(f"nothing said {text!r}")


# Flushes to the disk of rank 0 and of rank 1 in a run: that one brings the small files and the folders there.
_FLUSHES = (40, 4)


def _strike(trial: Trial, event: str, last: int, action: str, delay_s: float, after: float = 0.0) -> None:
    """Starts the job with a fault on a random rank, at one of `last` such events or shortly after.

    after: the part of them that comes before.
    """
    rank = trial.random.randrange(2)
    last = _FLUSHES[rank] if event == "save" else last
    fault = {
        "rank": rank, "event": event, "count": trial.random.randint(1 + int(after * last), last),
        "delay_s": trial.random.uniform(0, delay_s), "action": action,
    }  # fmt: skip
    trial.start(fault)


def _killed(event: str, last: int, delay_s: float) -> Callable[[Trial], None]:
    def run(trial: Trial) -> None:
        _strike(trial, event, last, "kill", delay_s)
        trial.end(0)

    return run


def _job_killed_in_save(trial: Trial) -> None:
    _strike(trial, "save", 0, "kill job", 0.05, after=0.35)  # not before there is a checkpoint
    if trial.end(-9, 0):
        trial.complete()


def _signalled(action: str, name: str) -> Callable[[Trial], None]:
    def run(trial: Trial) -> None:
        event, last = trial.random.choice([("step", 11), ("save", 0), ("evaluate", 2), ("start", 1)])
        if action == "terminate all":  # processes that read ahead, too
            trial.settings = (*trial.settings, "data.num_workers=1")
        _strike(trial, event, last, action, 2.0 if event == "start" else 0.1)
        if trial.end(REQUEUE, 0) == REQUEUE:
            trial.expect(name) if event != "start" else None
            trial.complete()
        trial.redone_limit = 0  # it saves before it goes

    return run


def _stopped(trial: Trial) -> None:
    event, last = trial.random.choice([("step", 11), ("save", 0), ("evaluate", 2)])
    _strike(trial, event, last, "stop", 0.05)
    trial.end(0)
    if (trial.folder / "struck").exists():
        trial.expect("likely culprit: rank")


def _damaged(change: Callable[[Path, random.Random], None]) -> Callable[[Trial], None]:
    """A job that is killed after its second checkpoint or later, whose newest one is then damaged."""

    def run(trial: Trial) -> None:
        job = trial.start()
        if not job.ran_to(trial.random.randint(2 * SAVE_INTERVAL + 1, ITERATIONS), trial.limit_s):
            trial.problems.append("it ended before it could be damaged")
        wait_until(lambda: _can_fall_back(trial.checkpoints), trial.limit_s)
        for pid in processes(trial.folder):
            kill(pid)
        trial.end(-9, 0)
        newest = int((trial.checkpoints / LATEST).read_text())
        folder = folder_of(trial.checkpoints, newest)
        name = trial.random.choice([*sorted(read_manifest(folder).files), MANIFEST])
        change(folder / name, trial.random)
        trial.struck = time.time()
        trial.good = good(trial.checkpoints)
        trial.redone_limit = 2 * SAVE_INTERVAL  # those since the damaged one, and those before it
        trial.complete()
        trial.expect(f"passed over: {folder}")

    return run


def _can_fall_back(checkpoints: Path) -> bool:
    """Whether a good checkpoint is older than the one that LATEST names, which moves after the rename."""
    newest = read_pointer(checkpoints / LATEST)
    return newest is not None and any(iteration < newest for iteration in good(checkpoints))


def _flip(path: Path, choose: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[choose.randrange(len(content))] ^= 1 << choose.randrange(8)
    path.write_bytes(content)


def _truncate(path: Path, choose: random.Random) -> None:
    os.truncate(path, choose.randrange(path.stat().st_size))


def _delete(path: Path, choose: random.Random) -> None:
    path.unlink()


def mount(*arguments: str) -> bool:
    """Whether the system let us mount that."""
    try:
        return not subprocess.run(["mount", *arguments], capture_output=True).returncode
    except FileNotFoundError:
        return False


def unmount(folder: Path) -> None:
    subprocess.run(["umount", "-l", str(folder)], capture_output=True)


def _held(trial: Trial, begin: Callable[[], bool], stop: Callable[[], None]) -> None:
    """From one random iteration on nothing can be written, for a while; then the run goes on to its end.

    A checkpoint that was due meanwhile may be given up, which is said: it is not missed here.
    """
    trial.may_lack, trial.redone_limit = True, ITERATIONS
    job = trial.start({"rank": 0, "event": "none", "count": 1, "delay_s": 0, "action": "none"})  # but slowly
    job.ran_to(trial.random.randint(SAVE_INTERVAL + 1, ITERATIONS - 2), trial.limit_s)
    trial.good = good(trial.checkpoints)
    trial.struck = time.time()
    if not begin():
        trial.problems.append("the fault could not be made")
    with suppress(subprocess.TimeoutExpired):
        job.process.wait(trial.random.uniform(0.3, 3.0))
    stop()
    for _ in range(2):
        if trial.end(0, FAILURE, USER_ERROR, NOT_SAVED) == 0:
            return
        trial.start()
    trial.end(0)


def _disk_full(trial: Trial) -> None:
    ballast = trial.folder / "ballast"

    def fill() -> bool:
        with suppress(OSError), ballast.open("wb", buffering=0) as file:
            while file.write(bytes(1 << 16)):
                pass
        return True

    _held(trial, fill, lambda: ballast.unlink(missing_ok=True))


def _read_only(trial: Trial) -> None:
    folder = str(trial.checkpoints)

    def begin() -> bool:
        if not mount("--bind", folder, folder):
            return False
        return wait_until(lambda: mount("-o", "remount,bind,ro", folder), 5)  # not while a file is written

    try:
        _held(trial, begin, lambda: unmount(trial.checkpoints))
    finally:
        unmount(trial.checkpoints)


def _spoilt_once(trial: Trial) -> None:
    _strike(trial, "forward", 11, "spoil once", 0)
    trial.end(0)
    trial.expect("hardware is suspected")


def _spoilt_data(trial: Trial) -> None:
    """Compared with a run that has the same samples spoilt; here a rank is killed later, too."""
    trial.start(SPOILT)
    job = trial.jobs[-1]
    job.ran_to(trial.random.randint(6, ITERATIONS - 1), trial.limit_s)
    trial.struck = time.time()
    for pid in ranks(trial.folder, 0):
        kill(pid)
    trial.end(0)


SPOILT = {"rank": 1, "event": "batch", "count": 5, "delay_s": 0, "action": "spoil data"}


KINDS: dict[str, Callable[[Trial], None]] = {
    "kill-start": _killed("start", 1, 4.0),
    "kill-step": _killed("step", 11, 0.06),
    "kill-save": _killed("save", 0, 0.03),
    "kill-evaluation": _killed("evaluate", 3, 0.1),
    "kill-job-in-save": _job_killed_in_save,
    "sigterm": _signalled("terminate", "SIGTERM"),
    "sigterm-to-all": _signalled("terminate all", "SIGTERM"),
    "sigusr1": _signalled("warn", "SIGUSR1"),
    "sigstop": _stopped,
    "flip": _damaged(_flip),
    "truncate": _damaged(_truncate),
    "delete": _damaged(_delete),
    "disk-full": _disk_full,
    "read-only": _read_only,
    "nan-machine": _spoilt_once,
    "nan-data": _spoilt_data,
}
