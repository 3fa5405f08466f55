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
MARK = re.compile(r"\d{6}\.json")
OURS = re.compile(r"\d{6}(_.*)?\.(bin|sizes|inputs|roles|json)(\.\d+)?(\.tmp)?|job\.json(\.tmp)?|lock")


class PartsFolder:
    """Held by one command at a time. Use it as a context manager.

    Attributes:
        path: of the folder.

    Raises:
        ValueError: another command holds it, it holds something else, or partitions of another job.
    """

    def __init__(self, path: str, job: Mapping[str, str], force: bool) -> None:
        self.path, self._job, self._force = path, dict(job), force

    def __enter__(self) -> Self:
        Path(self.path).mkdir(parents=True, exist_ok=True)
        self._lock = os.open(f"{self.path}/{LOCK}", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self._take()
        except BaseException:
            os.close(self._lock)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._lock)

    def remove(self) -> None:
        """Remove it with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)

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
        before = self._read_job()
        different = [key for key in self._job if before.get(key) != self._job[key]]
        if before and different and not self._force and self._has_finished():
            shown = ", ".join(key.replace("_", "-") for key in different)
            raise ValueError(
                f"{self.path} holds finished partitions of another job, with other {shown}: give the same "
                "inputs and options to go on with it, or --force to start over"
            )
        if different:
            for name in os.listdir(self.path):
                if name != LOCK:
                    os.unlink(f"{self.path}/{name}")
            with open(f"{self.path}/{JOB}.tmp", "w", encoding="utf-8") as file:
                json.dump(self._job, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            os.replace(f"{self.path}/{JOB}.tmp", f"{self.path}/{JOB}")

    def _has_finished(self) -> bool:
        """Whether a partition is finished: otherwise there is nothing to lose."""
        return any(MARK.fullmatch(name) for name in os.listdir(self.path))

    def _read_job(self) -> dict[str, str]:
        try:
            content = json.loads(Path(f"{self.path}/{JOB}").read_bytes())
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}


def is_of_job(path: str, job: Mapping[str, str]) -> bool:
    """Whether the folder holds partitions of this job."""
    try:
        return bool(json.loads(Path(f"{path}/{JOB}").read_bytes()) == dict(job))
    except (OSError, ValueError):
        return False
