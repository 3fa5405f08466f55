"""A Slurm of this machine for tests, started and stopped by scripts/slurm_cluster.sh."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from runs import RANK_VARIABLES, ROOT
from waiting import LIMIT_S, wait_until

SCRIPT = ROOT / "scripts" / "slurm_cluster.sh"


class Cluster:
    """A Slurm that runs; its nodes are n0, n1, ..."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        kept = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
        self.environment = kept | {"SLURM_CONF": str(folder / "slurm.conf"), "OMP_NUM_THREADS": "1"}

    def ask(self, *command: str) -> str:
        """What one of Slurm's commands prints."""
        return subprocess.run(
            command, env=self.environment, check=True, capture_output=True, text=True, timeout=LIMIT_S
        ).stdout

    def megatsp(self, *arguments: str, timeout_s: float = LIMIT_S) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "megatsp", *arguments],
            cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=timeout_s,
        )  # fmt: skip

    def submit(self, *arguments: str) -> str:
        """Submits a job; returns its number."""
        result = self.megatsp("launch", "slurm", *arguments)
        assert result.returncode == 0, result.stdout + result.stderr
        return re.match(r"submitted job (\d+)", result.stdout)[1]  # type: ignore[index]

    def facts(self, job: str) -> dict[str, str]:
        words = self.ask("scontrol", "show", "job", job, "--oneliner").split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state(self, job: str) -> str:
        return self.facts(job)["JobState"]

    def hurry(self, job: str) -> None:
        """Starts a requeued job now, which Slurm holds back for two minutes, and with time enough."""
        self.wait(lambda: self.state(job) == "PENDING", f"job {job} is in the queue")
        self.ask("scontrol", "update", f"JobId={job}", "StartTime=now", "TimeLimit=30")

    def finish(self, job: str, hurries: bool = False) -> str:
        """Waits until a job is over; returns its last state. hurries: a requeued one starts at once."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

        def is_over() -> bool:
            state = self.state(job)
            if hurries and state == "PENDING":
                self.ask("scontrol", "update", f"JobId={job}", "StartTime=now")
            return state in over

        self.wait(is_over, f"job {job} is over")
        return self.state(job)

    def wait(self, condition: Callable[[], object], what: str, pause_s: float = 0.2) -> None:
        def state() -> str:
            logs = "\n".join(path.read_text(errors="replace")[-3000:] for path in self.logs())
            return f"{what}\n{self.ask('squeue')}\n{logs}"

        wait_until(condition, state, pause_s)

    def logs(self) -> Iterator[Path]:
        """The logs of all jobs, and of their ranks 0."""
        for line in self.ask("scontrol", "show", "job", "--oneliner").splitlines():
            if match := re.search(r" StdOut=(.*?) \w+=", line):
                log = Path(match[1])
                yield from [log] * log.is_file()
                yield from log.parent.glob(f"{log.stem}/attempt_*/rank_00000.log")

    def lose(self, node: str) -> None:
        """Kills a node's daemon, by which Slurm loses it."""
        os.kill(int((self.folder / "run" / f"{node}.pid").read_text()), signal.SIGKILL)

    def bring_back(self, node: str) -> None:
        """Starts it again."""
        subprocess.run(["slurmd", "-N", node], env=self.environment, check=True, timeout=LIMIT_S)
        self.wait(
            lambda: "idle" in self.ask("sinfo", "-h", "-n", node, "-p", "all", "-o", "%t"), f"{node} is up"
        )


@contextmanager
def cluster(folder: Path, nodes: int, cpus: int) -> Iterator[Cluster]:
    """A Slurm of so many nodes; on leaving, whatever it started ends."""
    start = subprocess.run(
        ["bash", str(SCRIPT), "start", str(folder), str(nodes), str(cpus)],
        capture_output=True, text=True, timeout=LIMIT_S,
    )  # fmt: skip
    try:
        assert start.returncode == 0, start.stdout + start.stderr
        yield Cluster(folder)
    finally:
        if folder.is_dir():
            subprocess.run(["bash", str(SCRIPT), "stop", str(folder)], check=True, timeout=LIMIT_S)
            shutil.rmtree(folder, ignore_errors=True)


def ranks_of(attempt: Path) -> list[int]:
    """Process ids of the ranks of a job's attempt, wherever they are, and not of what they started."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment = (process / "environ").read_bytes().split(b"\0")
            command = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        is_ours = f"MEGATSP_ATTEMPT_FOLDER={attempt}".encode() in environment
        if is_ours and command[1:3] == [b"-m", b"megatsp"]:
            found.append(int(process.name))
    return found


def tasks_on(node: str, *command: str) -> list[int]:
    """Process ids of srun's tasks on a node that run `python -m` with this beginning of arguments."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment = (process / "environ").read_bytes().split(b"\0")
            arguments = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        is_there = f"SLURMD_NODENAME={node}".encode() in environment
        if is_there and arguments[1 : 2 + len(command)] == [b"-m", *map(str.encode, command)]:
            found.append(int(process.name))
    return found


def signal_ranks(attempt: Path, number: signal.Signals) -> None:
    for pid in ranks_of(attempt):
        os.kill(pid, number)
