"""Local ranks end together: with success, the failing rank's error, a signal or the launcher."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from waiting import LIMIT_S, is_alive, wait_until, wait_until_gone

ROOT = Path(__file__).resolve().parents[1]

# The arguments: how many restarts ("": of ranks that do not resume) with which pause, and what the ranks run.
# The newest checkpoint is that of the iteration in the file `newest`. Two signals are two, however close.
LAUNCHER = """
import pathlib, sys
from megatsp.launcher import Restarts, launch_local, signals
signals._ONE_S = 0.0
limit, pause, *command = sys.argv[1:]
newest = pathlib.Path(command[-1], "newest")
restarts = Restarts(int(limit), float(pause), lambda: int(newest.read_text())) if limit else None
sys.exit(launch_local(2, [sys.executable, *command], restarts))
"""

# A rank: writes its pid into the folder given, then does what MODE says; of several, joined by commas, what
# the one of this attempt says.
RANK = """
import os, pathlib, signal, subprocess, sys, time

from megatsp.launcher import become_rank

become_rank([])
modes, folder, rank = sys.argv[1].split(","), pathlib.Path(sys.argv[2]), int(os.environ["RANK"])
attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
mode = modes[attempt]

asked = []

def hear(number):
    asked.append(number)
    (folder / f"asked{rank}").write_text("x" * len(asked))

def work():
    if mode == "graceful":
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, lambda number, _: hear(number))
    elif mode != "wait":
        signal.signal(signal.SIGTERM, lambda *_: None)  # as a rank does that only notes it
    (folder / f"attempt{attempt}rank{rank}").write_text(str(os.getpid()))
    (folder / f"ready{rank}").write_text(f"{os.getpid()} {os.environ['OMP_NUM_THREADS']}")
    if mode == "success":
        return 0
    if mode == "hangs" and rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    while rank == 1 and mode != "graceful":
        while not (folder / f"attempt{attempt}rank0").exists():  # else it may be ended before it wrote it
            time.sleep(0.01)
        if mode == "exception":
            raise RuntimeError("broken on purpose")
        if mode == "status":
            sys.exit(7)
        if mode == "mistake":
            from megatsp.schema import Config
            from megatsp.validate import validate

            validate(Config(name="a/b"), world_size=1)
        if mode == "killed":
            child = subprocess.Popen(["sleep", "infinity"])
            (folder / "child").write_text(str(child.pid))
            os.kill(os.getpid(), signal.SIGKILL)
        if mode == "hangs":
            (folder / "newest").write_text("3")  # but before that it saved
            return 76
        time.sleep(0.05)
    while not asked or not (folder / "step").exists():  # a step that is finished first, when the test says so
        time.sleep(0.05)
    (folder / f"saved{rank}").write_text(str(len(asked)))
    return 0 if asked == [signal.SIGINT] else 75

if len(modes) > 1 and mode != "exception":  # where torch's record has nothing to do, its import has neither
    sys.exit(work())
from megatsp.launcher import run_rank

run_rank(work)
"""


class Job:
    """A launcher with two ranks, in a session of its own like a command on a terminal."""

    def __init__(self, folder: Path, mode: str, limit: str, pause: str, environment: dict[str, str]) -> None:
        self.folder = folder
        (folder / "newest").write_text("0")
        script = folder / "rank.py"
        script.write_text(RANK)
        inherited = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        with (folder / "stderr").open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-c", LAUNCHER, limit, pause, str(script), mode, str(folder)],
                env={**inherited, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder), **environment},
                stderr=stderr,
                start_new_session=True,
            )

    @property
    def said(self) -> str:
        """The text on stderr so far."""
        return (self.folder / "stderr").read_text()

    def wait_until_asked(self, times: int = 1) -> None:
        """Until both ranks were told so many times to end, and the user that they finish their step."""
        files = [self.folder / f"asked{rank}" for rank in range(2)]
        wait_until(
            lambda: (
                all(file.exists() and len(file.read_text()) >= times for file in files)
                and self.said.count("finishing this step") >= times
            ),
            "the ranks are asked",
        )

    def finish_step(self) -> None:
        (self.folder / "step").touch()

    def wait_until_ready(self) -> list[int]:
        """The ranks' process ids, once both run."""
        files = [self.folder / f"ready{rank}" for rank in range(2)]
        wait_until(lambda: all(file.exists() and file.read_text() for file in files), "both ranks run")
        return [int(file.read_text().split()[0]) for file in files]

    def end(self) -> tuple[int, str]:
        """The exit status and the text on stderr."""
        return self.process.wait(timeout=LIMIT_S), self.said


@pytest.fixture
def start(tmp_path: Path) -> Iterator[object]:
    jobs: list[Job] = []

    def start_job(mode: str, limit: str = "", pause: str = "0.05", **environment: str) -> Job:
        jobs.append(Job(tmp_path, mode, limit, pause, environment))
        return jobs[-1]

    yield start_job
    for job in jobs:
        job.process.kill()
        job.process.wait()


def test_success_is_silent_and_cores_are_shared(start, tmp_path):
    job = start("success,")
    assert job.end() == (0, "")
    threads = [(tmp_path / f"ready{rank}").read_text().split()[1] for rank in range(2)]
    assert threads == [str(max(1, len(os.sched_getaffinity(0)) // 2))] * 2


def test_the_users_thread_count_is_kept(start, tmp_path):
    assert start("success,", OMP_NUM_THREADS="3").end()[0] == 0
    assert (tmp_path / "ready0").read_text().split()[1] == "3"


def test_exception_shows_that_ranks_traceback_alone(start):
    job = start("exception")
    pids = job.wait_until_ready()
    status, text = job.end()
    assert status == 1
    assert text.startswith("megatsp: error: rank 1: RuntimeError: broken on purpose\nTraceback")
    assert 'raise RuntimeError("broken on purpose")' in text
    assert text.count("Traceback") == 1 and "ChildFailedError" not in text
    assert not any(map(is_alive, pids))


def test_a_users_mistake_is_one_message(start):
    status, text = start("mistake", limit="3").end()
    assert status == 2
    assert text.startswith("megatsp: error: ") and "name='a/b'" in text
    assert text.count("megatsp: error") == 1 and "Traceback" not in text


def test_exit_status_of_a_rank_is_named(start):
    assert start("status", limit="3").end() == (7, "megatsp: error: rank 1: exited with status 7\n")


def test_killed_rank_ends_the_job_and_is_named(start):
    job = start("killed,")
    pids = job.wait_until_ready()
    assert job.end() == (137, "megatsp: error: rank 1: killed by SIGKILL\n")
    assert not any(map(is_alive, pids))


@pytest.mark.parametrize("whole_group", [False, True], ids=["launcher", "group"])
def test_interrupt_lets_every_rank_finish(start, tmp_path, whole_group):
    job = start("graceful")
    pids = job.wait_until_ready()
    (os.killpg if whole_group else os.kill)(job.process.pid, signal.SIGINT)
    job.wait_until_asked()
    job.finish_step()
    status, text = job.end()
    assert status == 0
    assert text.strip() == "megatsp: finishing this step; Ctrl-C again aborts"
    assert [(tmp_path / f"saved{rank}").read_text() for rank in range(2)] == ["1", "1"]
    assert not any(map(is_alive, pids))


def test_second_interrupt_aborts(start, tmp_path):
    job = start("graceful,")
    pids = job.wait_until_ready()
    os.kill(job.process.pid, signal.SIGINT)
    job.wait_until_asked()
    job.process.send_signal(signal.SIGINT)
    assert job.end()[0] == 130
    assert not (tmp_path / "saved0").exists() and not any(map(is_alive, pids))


def test_interrupt_of_ranks_that_do_not_handle_it(start):
    job = start("wait")
    pids = job.wait_until_ready()
    os.kill(job.process.pid, signal.SIGINT)
    assert job.end()[0] == 130
    assert not any(map(is_alive, pids))


def test_ranks_start_again_and_a_new_checkpoint_counts_anew(start, tmp_path):
    job = start("killed,exception,hangs,killed,success", limit="3")
    status, text = job.end()
    assert status == 0, text
    again = re.findall(
        r"megatsp: \d\d:\d\d:\d\d: (rank 1 .*): all ranks start again in (\S+) s \(restart (\d)", text
    )
    assert again == [
        ("rank 1 killed by SIGKILL", "0.05", "1"),
        ("rank 1 failed (RuntimeError: broken on purpose)", "0.1", "2"),
        ("rank 1 made no progress and ended itself", "0.05", "1"),
        ("rank 1 killed by SIGKILL", "0.1", "2"),
    ]
    assert text.count("Traceback") == 1 and text.count("megatsp: error: rank 1: killed by SIGKILL") == 2
    files = [*tmp_path.glob("attempt*"), tmp_path / "child"]
    assert len(files) == 11 and not any(is_alive(int(file.read_text())) for file in files)


def test_a_preemption_lets_every_rank_save_and_asks_for_a_requeue(start, tmp_path):
    job = start("graceful,", limit="3")
    pids = job.wait_until_ready()
    job.process.send_signal(signal.SIGUSR1)  # a scheduler's warning
    job.wait_until_asked()
    job.process.terminate()  # and its request
    job.wait_until_asked(2)
    job.finish_step()
    said = "".join(f"\nmegatsp: finishing this step ({name})\n" for name in ("SIGUSR1", "SIGTERM"))
    assert job.end() == (75, said)
    assert [(tmp_path / f"saved{rank}").read_text() for rank in range(2)] == ["2", "2"]
    assert not any(map(is_alive, pids))


def test_a_second_sigterm_stops_hard(start, tmp_path):
    job = start("graceful,", limit="3")
    pids = job.wait_until_ready()
    job.process.terminate()
    job.wait_until_asked()
    job.process.terminate()
    status, text = job.end()
    assert status == 143 and text.endswith("megatsp: error: stopped by SIGTERM\n")
    assert not (tmp_path / "saved0").exists() and not any(map(is_alive, pids))


def test_a_signal_ends_the_pause(start, tmp_path):
    job = start("killed,", limit="3", pause="200")
    wait_until(
        lambda: "start again in 200 s" in job.said or job.process.poll() is not None,
        "it waits",
    )
    before = job.said
    job.process.terminate()
    assert job.end() == (75, before)


def test_ranks_that_do_not_listen_yet_lose_nothing(start):
    job = start("wait,", limit="3")
    pids = job.wait_until_ready()
    job.process.terminate()
    assert job.end()[0] == 75
    assert not any(map(is_alive, pids))


def test_terminated_launcher_ends_its_ranks(start):
    job = start("wait,")
    pids = job.wait_until_ready()
    job.process.terminate()
    assert job.end() == (143, "megatsp: error: stopped by SIGTERM\n")
    assert not any(map(is_alive, pids))


def test_killed_launcher_leaves_no_process(start):
    job = start("wait")
    pids = job.wait_until_ready()
    assert all(map(is_alive, pids))
    job.process.kill()
    assert job.end()[0] == -signal.SIGKILL
    wait_until_gone(*pids)
