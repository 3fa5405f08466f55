"""Copies of the tree, in which faults are made and tests run: the checkout itself is never touched."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_LEFT_OUT = (".git", ".venv", "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache", "outputs", "runs")
_FAILED = re.compile(r"^(?:FAILED|ERROR) (tests/\S+?\.py(?:::\S+(?:\[.*?\])?)?)(?: - (.*))?$", re.MULTILINE)
_COUNT = re.compile(r"(\d+) (passed|failed|errors?)")
_OPTIONS = ["-q", "-p", "no:cacheprovider", "--no-header", "--tb=short", "-rfE"]
_NOT_INHERITED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "PYTEST_CURRENT_TEST", "PYTEST_ADDOPTS")
_SCRIPTS = str(Path(__file__).resolve().parents[1])
ALL_PASSED, SOME_FAILED, INTERRUPTED, NONE_RUN = 0, 1, 2, 5  # pytest's exit statuses


@dataclass(frozen=True)
class Run:
    """What pytest said.

    status: its exit status, None if it was ended by the limit. failed: why, by ids of tests, in their order.
    """

    status: int | None
    failed: dict[str, str]
    tests: int
    seconds: float
    output: str


class Copy:
    """A copy of `root` in which one fault at a time is made. A context manager: it is removed at the end."""

    def __init__(self, root: Path, folder: Path) -> None:
        self._root, self.folder = root, folder
        self._changed: dict[Path, str] = {}
        self._edits = 0
        self._starter: subprocess.Popen[str] | None = None
        self._running = 0  # the process of pytest

    def __enter__(self) -> "Copy":
        shutil.copytree(self._root, self.folder, symlinks=True, ignore=shutil.ignore_patterns(*_LEFT_OUT))
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()
        if self._starter is not None:
            self._starter.kill()
            self._starter.communicate()
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

    def test(self, arguments: Sequence[str], limit_s: float) -> Run:
        """Runs pytest here, on the copy's packages, also in processes that tests start."""
        since = time.monotonic()
        arguments = [*_OPTIONS, f"--basetemp={self._temporary}", *arguments]
        paths = [str(self.folder), str(self.folder / "kernels")]
        environment = {k: v for k, v in os.environ.items() if k not in _NOT_INHERITED}
        output = self.folder.with_name(f"{self.folder.name}.log")
        request = {
            "arguments": arguments,
            "folder": str(self.folder),
            "paths": paths,
            "not_paths": [_SCRIPTS, ""],
            "environment": {**environment, "PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "400"},
            "output": str(output),
        }
        starter = self._start()
        assert starter.stdin is not None and starter.stdout is not None
        starter.stdin.write(json.dumps(request) + "\n")
        starter.stdin.flush()
        self._running = int(starter.stdout.readline())
        has_expired = threading.Event()

        def expire() -> None:
            has_expired.set()
            self.stop()

        timer = threading.Timer(limit_s, expire)
        timer.start()
        status: int | None = int(starter.stdout.readline())
        timer.cancel()
        self._running = 0
        text = output.read_text(errors="replace")
        tests = sum(int(count) for count, _ in _COUNT.findall(text.strip().rpartition("\n")[2]))
        if has_expired.is_set():
            status = None
        return Run(status, dict(_FAILED.findall(text)), tests, time.monotonic() - since, text)

    def _start(self) -> "subprocess.Popen[str]":
        """The process that has torch imported, if it runs, or a new one."""
        if self._starter is None or self._starter.poll() is not None:
            imports = (self.folder / "tests" / "conftest.py").exists()  # ours imports torch
            self._starter = subprocess.Popen(
                [sys.executable, "-c", f"from mutant_runs.starter import serve; serve({imports})"],
                env={**os.environ, "PYTHONPATH": _SCRIPTS},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                bufsize=1,
                start_new_session=True,
            )
        return self._starter

    def stop(self) -> None:
        """Kills pytest, if it runs here, and what it started in its session."""
        if self._running:
            with suppress(ProcessLookupError):
                os.killpg(self._running, signal.SIGKILL)
