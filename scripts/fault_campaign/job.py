"""One run of a tiny model on two ranks, as a user starts it: its processes, its output, its end."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatsp.data.indexed import IndexedWriter
from megatsp.data.tokenizer import ByteTokenizer

ROOT = Path(__file__).resolve().parents[2]
PLANTED = Path(__file__).parent / "planted"
MARK = "MEGATSP_FAULTS_TRIAL"  # in the environment of every process of a trial: its folder
ITERATIONS, SAVE_INTERVAL, EVAL_INTERVAL = 12, 3, 4
HANG_S = 12.0
WORDS = ("the", "sun", "rose", "over", "a", "quiet", "harbour", "and", "nobody", "spoke", "until", "ships")

SETTINGS = (
    "model.num_layers=2", "model.hidden_size=32", "model.ffn_hidden_size=45", "model.kv_channels=8",
    "trainer.seq_length=32", "trainer.micro_batch_size=4", "trainer.global_batch_size=4",
    f"trainer.train_iters={ITERATIONS}", f"trainer.eval_interval={EVAL_INTERVAL}", "trainer.eval_iters=1",
    "data.valid_fraction=0.25", "data.num_workers=0", "optimizer.lr=0.01", "scheduler.lr_warmup_iters=2",
    "scheduler.min_lr=0.001", "logging.log_interval=1", "logging.wandb=disabled",
    f"checkpoint.save_interval={SAVE_INTERVAL}", f"trainer.hang_timeout_s={HANG_S:g}",
    "parallel.tsp=2", "launch.nproc=2", "launch.device=cpu", "launch.timeout_s=60",
    "launch.restart_backoff_s=0.1", "launch.max_restarts=4",
)  # fmt: skip


def write_corpus(prefix: Path) -> None:
    """Two dozen documents of 5 to 60 words, always the same."""
    random, tokenizer = np.random.RandomState(0), ByteTokenizer()
    with IndexedWriter(prefix, tokenizer) as writer:
        for i in range(24):
            text = " ".join(random.choice(WORDS, random.randint(5, 60)))
            writer.add(f"doc{i}", tokenizer.encode(text), len(text))


@dataclass
class Job:
    """`megatsp train` in a trial's folder. lines: what it printed, with the time of each."""

    folder: Path
    corpus: Path
    settings: tuple[str, ...] = ()
    fault: dict[str, Any] | None = None
    lines: list[tuple[float, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        paths = [str(PLANTED)] if self.fault else []
        environment["PYTHONPATH"] = os.pathsep.join(
            [*paths, *filter(None, [os.environ.get("PYTHONPATH", f"{ROOT}:{ROOT / 'kernels'}")])]
        )
        environment |= {MARK: str(self.folder), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        if self.fault:
            environment["MEGATSP_FAULT"] = json.dumps({"folder": str(self.folder), **self.fault})
        arguments = [*SETTINGS, f"data.path={self.corpus}", f"output_dir={self.folder}", *self.settings]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "megatsp", "train", *arguments],
            cwd=ROOT, env=environment, start_new_session=True, text=True, errors="replace",
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append((time.time(), line.rstrip()))

    def end(self, limit_s: float) -> int | None:
        """The exit status; None if it had not ended in so long, and was killed."""
        try:
            status: int | None = self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            status = None
            for pid in processes(self.folder):
                kill(pid)
            self.process.wait()
        self._reader.join(5)
        return status

    def ran_to(self, iteration: int, limit_s: float) -> bool:
        """Waits until an iteration was logged; False if it was not before the end or in so long."""

        def was_logged() -> bool:
            return any(found[1] >= iteration for found in iterations(self.lines))

        wait_until(lambda: was_logged() or self.process.poll() is not None, limit_s)
        return was_logged()

    @property
    def text(self) -> str:
        return "\n".join(line for _, line in self.lines)


def wait_until(condition: Callable[[], bool], limit_s: float) -> bool:
    """Looks until a condition holds, for so long at most; whether it did."""
    end = time.monotonic() + limit_s
    while not (holds := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return holds


def processes(folder: Path) -> list[int]:
    """Every process of a trial that runs, whoever started it; a zombie has ended."""
    mark, found = f"{MARK}={folder}".encode(), []
    for path in Path("/proc").glob("[0-9]*"):
        pid = int(path.name)
        if mark not in environment(pid):
            continue
        with suppress(OSError):  # it has ended meanwhile
            if (path / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
                found.append(pid)
    return found


def ranks(folder: Path, number: int) -> list[int]:
    """The processes of a trial that are the rank of this number, by the name that it gives itself."""
    found = []
    for pid in processes(folder):
        with suppress(OSError):
            if Path(f"/proc/{pid}/comm").read_text() == f"rank {number}\n":
                found.append(pid)
    return found


def environment(pid: int) -> list[bytes]:
    """What a process was started with, NAME=value; [] if it has ended or is just being started."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []


def kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


_ITERATION = re.compile(r"\s*iteration\s+(\d+)/")
_RESUMED = re.compile(r"resumed after iteration (\d+)")


def iterations(lines: list[tuple[float, str]]) -> list[tuple[float, int]]:
    """When each training iteration was logged."""
    found = ((at, _ITERATION.match(line)) for at, line in lines)
    return [(at, int(match[1])) for at, match in found if match]


def recovery_s(lines: list[tuple[float, str]], struck: float) -> float:
    """Seconds from a fault to the next iteration, of the attempt after it if there was one; 0: none came."""
    later = [(at, line) for at, line in lines if at > struck]
    begins = [at for at, line in later if _RESUMED.search(line) or ": new run; " in line]
    steps = [at for at, _ in iterations(later) if not begins or at >= begins[0]]
    return steps[0] - struck if steps and struck else 0.0


def redone(lines: list[tuple[float, str]]) -> int:
    """The most iterations that any resumption computed again."""
    last, worst = 0, 0
    for _, line in lines:
        if match := _ITERATION.match(line):
            last = int(match[1])
        elif match := _RESUMED.search(line):
            worst, last = max(worst, last - int(match[1])), int(match[1])
        elif ": new run; " in line:
            worst, last = max(worst, last), 0
    return worst
