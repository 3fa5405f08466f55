"""What a job's script asks: attempts are written down, and the answer is one line."""

import json
from pathlib import Path

import pytest

from megatsp.exit_status import FAILURE, REQUEUE, USER_ERROR
from megatsp.jobs import attempt
from megatsp.jobs.attempts import folder_of, read_attempts
from megatsp.launcher.failures import Failure
from megatsp.launcher.outcome import read_outcomes, write_outcome

TRACEBACK = 'Traceback (most recent call last):\n  File "x.py", line 1\nRuntimeError: no'


class Script:
    """The questions of a job of two nodes' script, on three nodes."""

    def __init__(self, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
        self.run, self.job = folder, folder / "slurm" / "job_7"
        self._capfd = capfd
        self.said = ""

    def ask(self, moment: str, *more: str) -> list[str]:
        known = ["--job", str(self.job), "--number", "7", "--run", str(self.run), "--nodes", "2"]
        known += ["--restarts", "3", "--backoff-s", "5", "--requeues", "2"]
        assert attempt.main([moment, *known, *more]) == 0
        captured = self._capfd.readouterr()
        self.said = captured.err
        return captured.out.split()

    def begin(self, *more: str) -> list[str]:
        return self.ask("begin", "--allocated", "n0 n1 n2", *more)

    def end(self, number: int, *more: str) -> list[str]:
        return self.ask("end", "--attempt", str(number), "--state", "RUNNING", *more)

    def save(self, iteration: int) -> None:
        pointer = self.run / "checkpoints" / "latest_checkpointed_iteration.txt"
        pointer.parent.mkdir(exist_ok=True)
        pointer.write_text(f"{iteration}\n")


@pytest.fixture
def script(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Script:
    return Script(tmp_path, capfd)


def test_an_attempt_that_ends_well_is_done(script: Script) -> None:
    folder = folder_of(script.job, 0)
    assert script.begin() == ["go", str(folder)]
    assert (folder / "live.txt").read_text() == "n0\nn1\nn2\n"
    script.save(40)
    assert script.end(0, "--ran") == ["done", "0"]
    (only,) = read_attempts(script.job)
    assert (only.iteration_before, only.iteration, only.action, only.status) == (-1, 40, "done", 0)


def test_the_first_failing_ranks_traceback_is_in_the_jobs_log(script: Script) -> None:
    script.begin()
    folder = folder_of(script.job, 0)
    write_outcome(folder, Failure(1, FAILURE, "RuntimeError: no", TRACEBACK, host="n1"))
    write_outcome(folder, Failure(0, FAILURE, "RuntimeError: connection closed", "Traceback ..."))
    assert script.end(0, "--status", "1") == ["again", "5"]
    assert f"error: rank 1: RuntimeError: no on n1\n{TRACEBACK}\n" in script.said
    assert "connection closed" not in script.said


def test_a_users_mistake_is_its_message_alone(script: Script) -> None:
    script.begin()
    write_outcome(folder_of(script.job, 0), Failure(0, USER_ERROR, "no such data\ngive some", TRACEBACK))
    assert script.end(0, "--status", "2") == ["stop", "2"]
    assert "error: no such data\ngive some\n" in script.said and "Traceback" not in script.said


def test_lost_nodes_stay_off_in_every_later_start(script: Script) -> None:
    script.begin()
    assert script.end(0, "--status", "137", "--down", "n1 n9") == ["again", "5"]
    assert script.begin("--down", "")[0] == "go"  # n1 has come back, and is not trusted
    assert (folder_of(script.job, 1) / "live.txt").read_text() == "n0\nn2\n"
    assert script.end(1, "--status", "137", "--down", "n2") == ["requeue", "n1,n2"]
    assert script.ask("begin", "--allocated", "n0 n1 n3") == ["go", str(folder_of(script.job, 2))]
    assert script.end(2, "--ran") == ["done", "0"]


def test_an_allocation_of_bad_nodes_is_given_back(script: Script) -> None:
    assert script.begin("--down", "n0 n2") == ["requeue", "n0,n2"]
    assert read_attempts(script.job) == []
    assert script.begin("--down", "n0 n2", "--restart", "2") == ["stop", "1"]
    assert "launch.slurm.max_requeues" in script.said


def test_a_job_that_was_taken_away_closes_its_attempt_when_it_comes_back(script: Script) -> None:
    script.begin()
    script.save(30)
    assert script.begin("--restart", "1", "--down", "n2")[0] == "go"
    first, second = read_attempts(script.job)
    assert (first.action, first.cause, first.away, first.iteration) == ("lost", "lost n2", ("n2",), 30)
    assert second.iteration_before == 30 and second.nodes == ("n0", "n1")


def test_a_script_that_outlives_its_job_changes_nothing(script: Script) -> None:
    script.begin()
    script.begin("--restart", "1")  # Slurm has started the job elsewhere
    before = (script.job / "attempts.jsonl").read_text()
    assert script.end(0, "--status", "1") == ["lost", "0"]
    assert (script.job / "attempts.jsonl").read_text() == before


def test_a_cancelled_job_stops_though_it_was_asked(script: Script) -> None:
    script.begin()
    write_outcome(folder_of(script.job, 0), Failure(0, REQUEUE, "stopped in good order"))
    (script.job / attempt.CANCEL).touch()
    assert script.end(0, "--asked", "USR1")[0] == "stop"


def test_a_cancelled_job_that_comes_back_does_not_begin(script: Script) -> None:
    script.begin()
    (script.job / attempt.CANCEL).touch()
    assert script.begin("--restart", "1") == ["stop", "130"]
    assert len(read_attempts(script.job)) == 1


def test_slurms_own_requeues_have_the_same_limit(script: Script) -> None:
    assert script.begin("--restart", "2")[0] == "go"
    assert script.begin("--restart", "3") == ["stop", "75"]
    assert "launch.slurm.max_requeues" in script.said


def test_what_was_asked_when_all_was_done_changes_nothing(script: Script) -> None:
    script.begin()
    assert script.end(0, "--asked", "USR1", "--ran") == ["done", "0"]
    script.begin()
    assert script.end(1, "--asked", "USR1")[0] == "requeue"  # before anything ran


def test_ranks_that_saved_as_asked_are_requeued_for_that(script: Script) -> None:
    script.begin()
    write_outcome(folder_of(script.job, 0), Failure(0, REQUEUE, "stopped in good order"))
    script.save(40)
    assert script.end(0, "--asked", "USR1", "--ran")[0] == "requeue"
    assert "requeue: Slurm asked it to end (USR1)" in script.said


def test_sruns_word_counts_where_ranks_were_killed(script: Script) -> None:
    script.begin()
    (folder_of(script.job, 0) / "srun.log").write_text(
        "some library: error: n7: task 1: no\nsrun: error: n1: task 3: Out Of Memory\n"
        "srun: error: n0: tasks 0-1: Killed\n"
    )
    assert script.end(0, "--status", "137")[0] == "again"
    assert "error: n1: task 3: Out Of Memory" in script.said


def test_a_node_on_which_no_task_starts_is_lost(script: Script) -> None:
    script.begin()
    said = "srun: error: Task launch for StepId=7.0 failed on node n1: Communication connection failure\n"
    (folder_of(script.job, 0) / "srun.log").write_text(said)
    assert script.end(0, "--status", "1")[0] == "again"
    assert read_attempts(script.job)[0].away == ("n1",)


def test_nodes_that_are_not_present_are_kept_off(script: Script) -> None:
    script.begin()
    folder = folder_of(script.job, 0)
    (folder / "present.txt").write_text("n0\nn2\n")
    assert script.end(0, "--status", "1")[0] == "again"
    assert read_attempts(script.job)[0].away == ("n1",)


def test_nodes_that_are_too_slow_are_kept_off(script: Script) -> None:
    script.begin()
    folder = folder_of(script.job, 0)
    (folder / "present.txt").write_text("n0\nn1\nn2\n")
    (folder / "preflight.json").write_text('{"bad": {"n2": ["GPU 3: GEMM"]}}')
    assert script.end(0, "--status", "1")[0] == "again"
    assert read_attempts(script.job)[0].away == ("n2",)


def test_a_damaged_history_is_named(script: Script) -> None:
    script.begin()
    (script.job / "attempts.jsonl").write_text('{"attempt": 0}\n')
    with pytest.raises(ValueError, match=r"attempts.jsonl, line 1, is no attempt of a job"):
        script.begin()


def test_an_outcome_is_the_ranks_own_word(tmp_path: Path) -> None:
    write_outcome(tmp_path, Failure(2, FAILURE, "RuntimeError: mine", TRACEBACK))
    write_outcome(tmp_path, Failure(2, 137, "killed by SIGKILL", was_killed=True))
    write_outcome(tmp_path, Failure(5, 137, "killed by SIGKILL", was_killed=True, host="n3"))
    assert [one.rank for one in read_outcomes(tmp_path)] == [5, 2]  # who was killed explains the others
    assert json.loads((tmp_path / "outcome_00002.json").read_text())["headline"] == "RuntimeError: mine"
