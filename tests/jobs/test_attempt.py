"""What a job's script asks: attempts are written down, and the answer is one line."""

import json
from pathlib import Path

import pytest

from megatsp.compose import compose
from megatsp.exit_status import FAILURE, HARDWARE, REQUEUE, USER_ERROR
from megatsp.jobs import attempt
from megatsp.jobs.attempts import folder_of, read_attempts
from megatsp.launcher.failures import Failure
from megatsp.launcher.outcome import read_outcomes, write_done, write_outcome
from megatsp.preflight.decide import Answer, judge_nodes
from megatsp.preflight.roll_call import _write
from megatsp.training.events import read_objects
from megatsp.training.folder import find_checkpoints

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

    def finish(self, number: int, *more: str) -> list[str]:
        """An attempt ends well."""
        write_done(folder_of(self.job, number))
        return self.end(number, "--ran", *more)

    def srun_says(self, number: int, *lines: str) -> None:
        (folder_of(self.job, number) / "srun.log").write_text("".join(f"{line}\n" for line in lines))

    def call_the_roll(self, number: int, *names: str, absent: tuple[str, ...] = ()) -> None:
        """A roll call of nodes of one rank leaves its report; nodes enough are never there."""
        come = [name for name in names if name not in absent]
        answers = [Answer(names.index(name), name, 0, name, True) for name in come]
        nodes = judge_nodes(answers, len(names), 1, names, devices=False)
        _write(folder_of(self.job, number), nodes, None, {})

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
    assert script.finish(0) == ["done", "0"]
    (only,) = read_attempts(script.job)
    assert (only.iteration_before, only.iteration, only.action, only.status) == (-1, 40, "done", 0)


def test_the_first_failing_ranks_traceback_is_in_the_jobs_log(script: Script) -> None:
    script.begin()
    folder = folder_of(script.job, 0)
    write_outcome(folder, Failure(1, FAILURE, "RuntimeError: no", TRACEBACK, host="n1"))
    write_outcome(folder, Failure(0, FAILURE, "RuntimeError: connection closed", "Traceback ..."))
    assert script.end(0, "--status", "1") == ["again", "5"]
    assert f"error: rank 1: RuntimeError: no on n1\n{TRACEBACK}\n" in script.said
    config = compose([f"output_dir={script.run.parent}", f"name={script.run.name}"])
    assert find_checkpoints(config, print) == []  # what the job leaves keeps no run out of its folder
    (event,) = read_objects(script.run / "events.jsonl")
    assert event["kind"] == "attempt failed"
    assert event["text"].startswith("attempt 0: rank 1: RuntimeError: no: again: it starts again")
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
    assert script.finish(2) == ["done", "0"]


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
    assert script.finish(0, "--asked", "USR1") == ["done", "0"]
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
    script.srun_says(
        0,
        "some library: error: n7: task 1: no",
        "srun: error: n1: task 3: Out Of Memory",
        "srun: error: n0: tasks 0-1: Killed",
    )
    assert script.end(0, "--status", "137")[0] == "again"
    assert "error: n1: task 3: Out Of Memory" in script.said


def test_a_node_on_which_no_task_starts_is_lost(script: Script) -> None:
    script.begin()
    script.srun_says(
        0, "srun: error: Task launch for StepId=7.0 failed on node n1: Communication connection failure"
    )
    assert script.end(0, "--status", "1")[0] == "again"
    assert read_attempts(script.job)[0].away == ("n1",)


def test_a_lost_node_that_is_back_by_now_is_lost(script: Script) -> None:
    script.begin()
    script.srun_says(0, "srun: error: Node failure on n[1-2]", "srun: error: n0: task 0: Killed")
    assert script.end(0, "--status", "137", "--ran", "--down", "")[0] == "requeue"
    (only,) = read_attempts(script.job)
    assert (only.cause, only.away) == ("lost n1, n2", ("n1", "n2"))


def test_a_lost_spare_node_is_kept_off_and_explains_nothing(script: Script) -> None:
    script.begin()
    (folder_of(script.job, 0) / "nodes.txt").write_text("n0\nn1\n")
    write_outcome(folder_of(script.job, 0), Failure(1, FAILURE, "RuntimeError: no", TRACEBACK, host="n1"))
    assert script.end(0, "--status", "1", "--ran", "--down", "n2") == ["again", "5"]
    assert read_attempts(script.job)[0].cause == "rank 1: RuntimeError: no"
    assert read_attempts(script.job)[0].away == ("n2",)
    script.begin()
    (folder_of(script.job, 1) / "nodes.txt").write_text("n0\nn1\n")
    assert script.finish(1, "--down", "n2") == ["done", "0"]


def test_nodes_that_the_roll_call_refused_are_named_and_kept_off(script: Script) -> None:
    script.ask("begin", "--allocated", "n0 n1")
    script.call_the_roll(0, "n0", "n1", absent=("n1",))
    assert script.end(0, "--status", "77") == ["stop", "77"]
    assert "error: the preflight refused n1" in script.said and "not n1" in script.said


def test_a_later_roll_call_that_refuses_has_the_job_requeued_without_the_node(script: Script) -> None:
    script.begin()
    script.end(0, "--status", "1", "--ran")
    script.ask("begin", "--allocated", "n0 n1")
    script.call_the_roll(1, "n0", "n1", absent=("n1",))
    assert script.end(1, "--status", "77") == ["requeue", "n1"]


def test_a_node_that_was_left_out_of_a_second_roll_call_is_refused(script: Script) -> None:
    script.begin()
    script.call_the_roll(0, "n1", "n2")
    write_done(folder_of(script.job, 0))
    assert script.end(0, "--status", "1", "--ran")[0] == "again"
    assert read_attempts(script.job)[0].away == ("n0",)


@pytest.mark.parametrize("says_itself", [True, False])
def test_a_node_whose_preflight_dies_is_kept_off(script: Script, says_itself: bool) -> None:
    script.begin()
    script.call_the_roll(0, "n0", "n1", "n2")
    if says_itself:
        write_outcome(folder_of(script.job, 0), Failure(1, HARDWARE, "GPU 0 does not answer", host="n1"))
    script.srun_says(
        0,
        "srun: error: n1: task 1: Segmentation fault",
        "srun: launch/slurm: _step_signal: Terminating StepId=7.1",
        "srun: error: n[0,2]: tasks 0,2: Terminated",
    )
    assert script.end(0, "--status", "139") == ["again", "5"]
    assert read_attempts(script.job)[0].away == ("n1",)
    script.ask("begin", "--allocated", "n0 n1 n2")
    assert read_attempts(script.job)[1].nodes == ("n0", "n2")


def test_a_killed_rank_explains_what_others_exit_with(script: Script) -> None:
    script.begin()
    script.call_the_roll(0, "n0", "n1", "n2")
    write_outcome(folder_of(script.job, 0), Failure(0, HARDWARE, "Connection closed", TRACEBACK, host="n0"))
    script.srun_says(
        0, "srun: error: n0: task 0: Exited with exit code 77", "srun: error: n1: task 1: Out Of Memory"
    )
    script.end(0, "--status", "137")
    assert read_attempts(script.job)[0].away == ("n1",)


def test_nodes_that_die_together_are_not_suspected(script: Script) -> None:
    script.begin()
    script.call_the_roll(0, "n0", "n1", "n2")
    died = [f"srun: error: n{number}: task {number}: Exited with exit code 1" for number in (1, 2)]
    script.srun_says(0, *died, "srun: Terminating StepId=7.1", "srun: error: n0: task 0: Terminated")
    assert script.end(0, "--status", "1")[0] == "again"
    assert read_attempts(script.job)[0].away == ()


def test_nodes_that_are_too_slow_are_kept_off(script: Script) -> None:
    script.begin()
    script.call_the_roll(0, "n0", "n1", "n2")
    (folder_of(script.job, 0) / "preflight.json").write_text('{"bad": {"n2": ["GPU 3: GEMM"]}}')
    assert script.end(0, "--status", "1")[0] == "again"
    assert read_attempts(script.job)[0].away == ("n2",)


def test_what_ended_for_lack_of_time_is_written_down(script: Script) -> None:
    for number, asked in enumerate(["TERM", "USR1"]):
        script.begin()
        write_outcome(folder_of(script.job, number), Failure(0, REQUEUE, "stopped in good order"))
        script.end(number, "--asked", asked, "--ran")
    assert [one.out_of_time for one in read_attempts(script.job)] == [False, True]


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
