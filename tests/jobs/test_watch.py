"""Looking at jobs where no Slurm is: what a job left says enough."""

import re
from dataclasses import asdict
from pathlib import Path

import pytest

from megatsp import cli
from megatsp.exit_status import FAILURE, USER_ERROR
from megatsp.jobs.attempts import Attempt, write_attempts
from megatsp.jobs.find import ask, jobs_of
from megatsp.launcher.failures import Failure
from megatsp.launcher.outcome import write_outcome

ENDED = Attempt(
    0, 7, 0, ("n0", "n1"), 100.0, -1, ended=150.0, iteration=5, status=1, cause="x", action="again"
)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose job 7 failed once and then began again."""
    monkeypatch.setenv("PATH", str(tmp_path))
    run = tmp_path / "run"
    for number in (0, 1):
        folder = run / "slurm" / "job_7" / f"attempt_{number}"
        folder.mkdir(parents=True)
        (folder / "rank_00000.log").write_text(f"attempt {number}\n")
    (run / "slurm" / "job_7.sh").touch()
    (run / "slurm" / "job_7.log").write_text("what the job says\n")
    values = asdict(ENDED) | {"attempt": 1, "action": "", "ended": 0.0, "cause": ""}
    write_attempts(run / "slurm" / "job_7", [ENDED, Attempt(**values)])
    failure = Failure(3, FAILURE, "RuntimeError: no", "Traceback ...\nRuntimeError: no", host="n1")
    write_outcome(run / "slurm" / "job_7" / "attempt_0", failure)
    return run


def logs(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["launch", "logs", *arguments]) == 0
    return capsys.readouterr().out


def test_the_last_failure_comes_first_also_of_an_attempt_before(run: Path, capsys) -> None:
    said = logs(capsys, str(run))
    first = "==> first to fail, in attempt 0: rank 3 on n1 <==\nTraceback ...\nRuntimeError: no\n"
    assert said.startswith(first)
    assert "attempt 1" in said and said.count("what the job says") == 1
    assert logs(capsys, str(run), "--attempt", "0").endswith("what the job says\n")
    assert (
        logs(capsys, str(run), "--rank", "0")
        == f"==> {run}/slurm/job_7/attempt_1/rank_00000.log <==\nattempt 1\n"
    )


def test_of_a_users_mistake_there_is_no_traceback(run: Path, capsys) -> None:
    write_outcome(run / "slurm" / "job_7" / "attempt_1", Failure(0, USER_ERROR, "give data", "Traceback"))
    assert "<==\ngive data\n" in logs(capsys, str(run))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank", "9"], "--rank 9: it has no log .* ranks 0 to 0 have one"),
        (["--attempt", "5"], "--attempt 5: job 7 has made 2"),
        (["--lines", "-1"], "--lines -1: must be at least 0"),
    ],
)
def test_what_is_not_there_is_named(run: Path, capsys, arguments, message) -> None:
    assert cli.main(["launch", "logs", str(run), *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_jobs_of_both_ways_of_submission_are_found(run: Path) -> None:
    (run / "slurm" / "job_12").mkdir()  # by plain sbatch
    (run / "slurm" / "job_9.sh").touch()
    assert jobs_of(run) == ["7", "9", "12"]


def test_a_whole_array_is_cancelled_also_tasks_that_wait(run: Path, capsys, tmp_path: Path) -> None:
    where = f"NodeList=n0 StdOut={run}/slurm/job_%j.log"
    (tmp_path / "scontrol").write_text(f"""#!/bin/bash
waiting="JobId=12 ArrayJobId=12 ArrayTaskId=2-4%1 JobState=PENDING StdOut=/nowhere/job_12.log"
running="JobId=13 ArrayJobId=12 ArrayTaskId=1 JobState=RUNNING {where}"
case $3 in
12) echo "$waiting"; echo "$running" ;;
12_1) echo "$running" ;;
*) echo "$waiting" ;;
esac
""")
    (tmp_path / "scancel").write_text(f'#!/bin/bash\necho "$*" >>{tmp_path}/cancelled\n')
    for name in ("scontrol", "scancel"):
        (tmp_path / name).chmod(0o755)
    assert cli.main(["launch", "cancel", "12"]) == 0
    assert (tmp_path / "cancelled").read_text() == "--batch --signal=USR1 12_1\n12_[2-4]\n"
    assert (run / "slurm" / "job_13" / "cancel").is_file()
    assert "job 12_[2-4] is cancelled" in capsys.readouterr().out
    assert cli.main(["launch", "status", "12"]) == 2
    assert "job 12 is an array: give one of its tasks, 12_1, 12_[2-4]" in capsys.readouterr().err


def test_the_own_number_of_an_arrays_task_is_that_task(run: Path, capsys, tmp_path: Path) -> None:
    (run / "slurm" / "job_7.sh").rename(run / "slurm" / "job_6_0.sh")
    (tmp_path / "scontrol").write_text(f"""#!/bin/bash
first="JobId=7 ArrayJobId=6 ArrayTaskId=0 JobState=RUNNING NodeList=n0 StdOut={run}/slurm/job_7.log"
last="JobId=6 ArrayJobId=6 ArrayTaskId=1 JobState=RUNNING NodeList=n1 StdOut=/nowhere/slurm/job_6.log"
case $3 in
7 | 6_0) echo "$first" ;;
6) echo "$first"; echo "$last" ;;
6_1) echo "$last" ;;
esac
""")
    (tmp_path / "scontrol").chmod(0o755)
    for number in ("7", "6_0"):
        assert cli.main(["launch", "status", number]) == 0
        assert f"{run}\njob 6_0  RUNNING  n0\n  attempt 0" in capsys.readouterr().out
    assert cli.main(["launch", "status", "6"]) == 2
    assert "job 6 is an array: give one of its tasks, 6_0, 6_1" in capsys.readouterr().err
    assert (ask("6").number, ask("6").task) == ("6", "6_1")
    (run / "slurm" / "job_6_0.sh").unlink()  # as plain sbatch has none
    assert jobs_of(run) == ["6_0"]


def test_a_slurm_that_does_not_answer_is_named(run: Path, capsys, monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "scontrol").write_text("#!/bin/bash\nexec /bin/sleep 20\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setattr("megatsp.jobs.find._PATIENCE_S", 0.2)
    assert cli.main(["launch", "status", str(run)]) == 2
    assert "Slurm does not answer: scontrol took longer than 0.2 s" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["status", "cancel"])
def test_what_needs_slurm_says_so(run: Path, capsys, command) -> None:
    assert cli.main(["launch", command, str(run)]) == 2
    assert "is not on the PATH" in capsys.readouterr().err
