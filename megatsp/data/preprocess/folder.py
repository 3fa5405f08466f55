"""PREFIX.parts: the finished partitions of a job, what the job was, and a lock."""

import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

JOB, LOCK = "job.json", "lock"
FORCED = "forced"  # in job.json: --force has begun, so the job goes on whatever the output is
FINISHED = re.compile(r"\d{6}\.json")
OURS = re.compile(r"\d{6}(_.*)?\.(bin|sizes|inputs|roles|json)(\.\d+)?(\.tmp)?|job\.json(\.tmp)?|lock")


class PartsFolder:
    """Held by one command at a time. Use it as a context manager.

    Args:
        path: of the folder.
        job: what finished partitions must be of.
        force: start over, unless a command with `force` has begun this job.

    Raises:
        ValueError: another command holds it, it holds something else, or partitions of another job.
    """

    def __init__(self, path: str, job: Mapping[str, str], force: bool) -> None:
        self.path, self._job, self._force = path, dict(job), force

    def __enter__(self) -> Self:
        try:
            Path(self.path).mkdir(parents=True, exist_ok=True)
            self._lock = os.open(f"{self.path}/{LOCK}", os.O_RDWR | os.O_CREAT, 0o644)
            try:
                self._take()
            except BaseException:
                os.close(self._lock)
                raise
        except OSError as error:
            raise ValueError(f"--output-prefix: cannot write to {self.path}: {error.strerror}") from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._lock)

    def remove(self) -> None:
        """Remove it with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)

    def finish(self) -> None:
        """The output is written; another --force starts over."""
        self._write_job({})

    def sweep(self) -> None:
        """Remove what was written in vain."""
        for path in Path(self.path).glob("*.tmp"):
            path.unlink(missing_ok=True)

    def _take(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise ValueError(f"another megatsp preprocess writes to {self.path}") from None
            # Some network file systems have no locks.
        others = sorted(name for name in os.listdir(self.path) if not OURS.fullmatch(name))
        if others:
            raise ValueError(
                f"{self.path} holds {others[0]}, which is none of ours: remove it or give another "
                "--output-prefix"
            )
        self.sweep()
        before = read_job(self.path)
        if self._force and not (FORCED in before and is_of_job(self.path, self._job)):
            before = {}
        different = [key for key in self._job if before.get(key) != self._job[key]]
        if different and not any(map(FINISHED.fullmatch, os.listdir(self.path))):
            before = {}  # nothing is lost
        if before and different:
            shown = ", ".join(key.replace("_", "-") for key in different)
            raise ValueError(
                f"{self.path} holds finished partitions of another job, with other {shown}: give the same "
                "inputs and options to go on with it, or --force to start over"
            )
        if not before:
            for name in os.listdir(self.path):
                if name != LOCK:
                    os.unlink(f"{self.path}/{name}")
            self._write_job({FORCED: "yes"} if self._force else {})

    def _write_job(self, more: Mapping[str, str]) -> None:
        with open(f"{self.path}/{JOB}.tmp", "w", encoding="utf-8") as file:
            json.dump({**self._job, **more}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{self.path}/{JOB}.tmp", f"{self.path}/{JOB}")


def read_job(path: str) -> dict[str, str]:
    """What the partitions in the folder are of; nothing if there are none."""
    try:
        content = json.loads(Path(f"{path}/{JOB}").read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def is_of_job(path: str, job: Mapping[str, str]) -> bool:
    """Whether the folder holds partitions of this job."""
    found = read_job(path)
    found.pop(FORCED, None)
    return found == dict(job)


def is_forced(path: str, job: Mapping[str, str]) -> bool:
    """Whether the folder holds partitions of this job that are to replace the output."""
    return is_of_job(path, job) and FORCED in read_job(path)
