"""Copies of the tree, in which faults are made and tests run: the checkout itself is never touched."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_LEFT_OUT = (".git", ".venv", "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache", "outputs", "runs")
_FAILED = re.compile(r"^(?:FAILED|ERROR) (tests/\S+?\.py(?:::\S+(?:\[.*?\])?)?)(?: - .*)?$", re.MULTILINE)
_COUNT = re.compile(r"(\d+) (passed|failed|errors?)")
ALL_PASSED, SOME_FAILED, INTERRUPTED, NONE_RUN = 0, 1, 2, 5  # pytest's exit statuses


@dataclass(frozen=True)
class Run:
    """What pytest said. status: its exit status, None if it was ended by the limit. failed: ids of tests."""

    status: int | None
    failed: list[str]
    tests: int
    seconds: float
    output: str


class Copy:
    """A copy of `root` in which one fault at a time is made. A context manager: it is removed at the end."""

    def __init__(self, root: Path, folder: Path) -> None:
        self._root, self.folder = root, folder
        self._changed: dict[Path, str] = {}
        self._edits = 0
        self._running = 0  # the process of pytest

    def __enter__(self) -> "Copy":
        shutil.copytree(self._root, self.folder, symlinks=True, ignore=shutil.ignore_patterns(*_LEFT_OUT))
        return self

    def __exit__(self, *error: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.rmtree(self._temporary, ignore_errors=True)

    @property
    def _temporary(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}t")

    def write(self, path: Path, text: str) -> None:
        """Writes a file of the copy, given by its path in the root or in the copy."""
        target = self.folder / path.relative_to(self._root) if path.is_relative_to(self._root) else path
        if target.exists():
            self._changed.setdefault(target, target.read_text())
        self._put(target, text)

    def restore(self) -> None:
        """Every file as it was copied."""
        for path, text in self._changed.items():
            self._put(path, text)
        self._changed.clear()

    def _put(self, path: Path, text: str) -> None:
        path.write_text(text)
        self._edits += 1  # Python knows compiled files by seconds and sizes: no two edits are alike
        stamp = time.time() + 2 * self._edits
        os.utime(path, (stamp, stamp))

    def test(self, arguments: Sequence[str], limit_s: float, environment: Mapping[str, str] = {}) -> Run:
        """Runs pytest here, on the copy's packages, also in processes that tests start."""
        since = time.monotonic()
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "--no-header",
            "--tb=short",
        ]
        command += ["-rfE", f"--basetemp={self._temporary}", *arguments]
        paths = os.pathsep.join([str(self.folder), str(self.folder / "kernels")])
        inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        inherited.pop("PYTEST_CURRENT_TEST", None)
        process = subprocess.Popen(
            command,
            cwd=self.folder,
            env={**inherited, "PYTHONPATH": paths, "COLUMNS": "400", **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._running = process.pid
        status: int | None
        try:
            output, _ = process.communicate(timeout=limit_s)
            status = process.returncode
        except subprocess.TimeoutExpired:
            self.stop()
            output, _ = process.communicate()
            status = None
        self._running = 0
        summary = output.strip().rpartition("\n")[2]
        tests = sum(int(count) for count, _ in _COUNT.findall(summary))
        return Run(status, _FAILED.findall(output), tests, time.monotonic() - since, output)

    def stop(self) -> None:
        """Kills pytest, if it runs here, and what it started in its session."""
        if self._running:
            with suppress(ProcessLookupError):
                os.killpg(self._running, signal.SIGKILL)
