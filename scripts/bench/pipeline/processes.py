"""A command with the processes that it starts: how long it took, how much processor, how much memory."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

SAMPLE_S = 0.05
ROOT = Path(__file__).resolve().parents[3]


@dataclass
class Used:
    """What a command used. worker_peak_bytes: resident memory of the largest of its child processes."""

    wall_s: float
    cpu_s: float  # user and system, of all processes
    parent_peak_bytes: int
    worker_peak_bytes: int
    output: str


def watch(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Used:
    """Run a command to its end.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    peaks: dict[int, int] = {}
    with tempfile.TemporaryFile() as said:
        started = time.perf_counter()
        process = subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", **(environment or {})},
            stdout=said,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            _sample(process.pid, peaks)
            time.sleep(SAMPLE_S)
        wall_s = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        output = said.read().decode(errors="replace")
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with status {process.returncode}: {output[-2000:]}")
    own = peaks.pop(process.pid, 0)
    return Used(wall_s, usage.ru_utime + usage.ru_stime, own, max(peaks.values(), default=0), output)


def python(*arguments: str) -> list[str]:
    """A command of this interpreter."""
    return [sys.executable, *arguments]


def status(pid: int | str = "self") -> dict[str, int]:
    """Numbers of /proc/PID/status; those of memory in bytes."""
    found = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        words = value.split()
        if words and words[0].isdigit():
            found[name] = int(words[0]) * (1024 if words[-1] == "kB" else 1)
    return found


def _sample(root: int, peaks: dict[int, int]) -> None:
    """The peak resident memory so far of a process and all below it."""
    parents = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                stat = Path(f"/proc/{entry}/stat").read_text()
            except OSError:
                continue
            parents[int(entry)] = int(stat.rpartition(")")[2].split()[1])
    family = {root}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    for pid in family:
        try:
            peaks[pid] = max(peaks.get(pid, 0), status(pid).get("VmHWM", 0))
        except OSError:
            continue
