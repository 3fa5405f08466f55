"""What follows an attempt: one case a rule, and the rules' order."""

from dataclasses import replace

import pytest

from megatsp.exit_status import FAILURE, HARDWARE, NOT_SAVED, REQUEUE, USER_ERROR
from megatsp.jobs.attempts import Attempt
from megatsp.jobs.judge import End, Limits, Verdict, judge
from megatsp.launcher.failures import Failure

LIMITS = Limits(nodes=2, restarts=3, backoff_s=5.0, requeues=4)
NOW = Attempt(1, 7, restart=0, nodes=("n0", "n1", "n2"), started=100.0, iteration_before=10)
GOOD = End(
    0, True, True, (), (), "", asked="", state="RUNNING", is_cancelled=False, down=(), unfit=(), iteration=20
)
RAISED = Failure(3, FAILURE, "RuntimeError: no", "Traceback ...", host="n1")
STUCK = replace(GOOD, status=1, is_complete=False, outcomes=(RAISED,), iteration=10)
FAILED = f"no rank says why it ended; exit status {USER_ERROR}"
IN_ORDER = replace(GOOD, is_complete=False, outcomes=(Failure(0, REQUEUE, "stopped in good order"),))


def after(*changes: dict) -> list[Attempt]:
    """Closed attempts before NOW, which saved nothing unless they say so."""
    closed = replace(
        NOW, ended=200.0, iteration=10, status=1, cause="rank 3: RuntimeError: no", action="again"
    )
    return [replace(closed, attempt=number, **own) for number, own in enumerate(changes)]


def verdict(end: End, *before: dict, **now: object) -> Verdict:
    return judge(end, after(*before), replace(NOW, **now), LIMITS)  # type: ignore[arg-type]


def test_every_rank_with_0_is_done() -> None:
    assert verdict(GOOD).action == "done"
    replaced = verdict(replace(GOOD, unfit=("n2",)))  # a spare node did its work, or is lost itself
    assert (replaced.action, replaced.cause) == ("done", "")


def test_that_no_rank_failed_is_not_yet_done() -> None:
    found = verdict(replace(GOOD, is_complete=False))
    assert (found.action, found.cause) == ("again", "no rank says that all is done")


@pytest.mark.parametrize("status", [USER_ERROR, NOT_SAVED])
def test_what_another_attempt_would_repeat_stops_with_its_status(status: int) -> None:
    end = replace(GOOD, status=1, outcomes=(Failure(0, status, "why"),), asked="USR1")
    found = verdict(end)
    assert (found.action, found.status, found.cause) == ("stop", status, "rank 0: why")


@pytest.mark.parametrize("change", [{"is_cancelled": True}, {"state": "CANCELLED"}])
def test_a_cancelled_job_does_not_come_back(change: dict) -> None:
    assert verdict(replace(IN_ORDER, asked="USR1", **change)).action == "stop"


def test_good_order_is_requeued_and_keeps_no_node_off() -> None:
    found = verdict(replace(IN_ORDER, asked="USR1"))
    assert (found.action, found.away) == ("requeue", ())
    assert "USR1" in found.why


def test_a_preflight_that_ends_because_it_is_asked_to_has_not_failed() -> None:
    end = replace(GOOD, status=138, has_run=False, is_complete=False, asked="USR1")
    found = verdict(replace(end, said=("n2: task 0: User defined signal 1",)))
    assert (found.action, found.cause) == ("requeue", "")


def test_a_limit_of_its_own_is_requeued_too() -> None:
    assert verdict(IN_ORDER).action == "requeue"


def test_ranks_killed_by_the_request_itself_are_requeued() -> None:
    killed = Failure(0, 138, "killed by SIGUSR1", was_killed=True)
    assert verdict(replace(GOOD, status=138, outcomes=(killed,), asked="USR1")).action == "requeue"


def test_two_requeues_without_a_save_stop() -> None:
    end = replace(IN_ORDER, asked="USR1", iteration=10)
    before = {"action": "requeue", "cause": "", "out_of_time": True}
    assert verdict(end, before).action == "stop"
    assert verdict(end, before | {"iteration": 11}).action == "requeue"
    assert verdict(replace(end, iteration=11), before).action == "requeue"


@pytest.mark.parametrize("asked", ["TERM", ""])  # of a preemption, Slurm may tell the ranks alone
def test_two_preemptions_without_a_save_do_not_stop(asked: str) -> None:
    end = replace(IN_ORDER, asked=asked, iteration=10)
    limit = {"action": "requeue", "cause": "", "out_of_time": True}
    assert verdict(end, limit).action == "requeue"
    assert verdict(replace(end, asked="USR1"), limit | {"out_of_time": False}).action == "requeue"
    own = replace(LIMITS, has_own=True)
    assert judge(replace(end, asked=""), after(limit), NOW, own).action == "stop"


def test_the_requeues_have_a_limit() -> None:
    found = verdict(replace(IN_ORDER, asked="USR1"), restart=4)
    assert (found.action, found.status) == ("stop", REQUEUE)
    assert "launch.slurm.max_requeues" in found.why


def test_a_failure_starts_again_in_the_same_allocation_ever_later() -> None:
    assert verdict(STUCK) == Verdict(
        "again", "it starts again in 5 s", "rank 3: RuntimeError: no", FAILURE, 5.0, ()
    )
    assert verdict(STUCK, {"cause": "rank 3: other"}).pause_s == 10.0


def test_the_same_failure_twice_without_a_checkpoint_stops_with_the_reason() -> None:
    found = verdict(STUCK, {})
    assert (found.action, found.status) == ("stop", FAILURE)
    assert "same failure twice" in found.why and found.cause == "rank 3: RuntimeError: no"


@pytest.mark.parametrize("before", [{"cause": "rank 1: other"}, {"iteration": 11}])
def test_another_failure_or_a_checkpoint_between_is_not_the_same(before: dict) -> None:
    assert verdict(STUCK, before).action == "again"
    assert verdict(replace(STUCK, iteration=11), {}).action == "again"


@pytest.mark.parametrize(
    ("before", "now"),
    [
        (
            "rank 17: OutOfMemoryError: tried to allocate 2.00 GiB",
            "OutOfMemoryError: tried to allocate 16 GiB",
        ),
        ("rank 4: RuntimeError: <Work at 0x7f0012ab>", "RuntimeError: <Work at 0x7faa34cd>"),
        ("n7: task 3: Killed", ""),
    ],
)
def test_the_same_failure_of_another_rank_is_the_same(before: str, now: str) -> None:
    end = replace(STUCK, outcomes=(Failure(803, FAILURE, now, "Traceback"),) if now else ())
    end = replace(end, said=("n1: tasks 0-1: Killed",))
    assert verdict(end, {"cause": before}).action == "stop"
    assert verdict(end, {"cause": "rank 803: RuntimeError: no"}).action == "again"


def test_restarts_without_a_checkpoint_have_a_limit() -> None:
    before = [{"cause": f"rank {rank}: other"} for rank in range(3)]
    found = verdict(STUCK, *before)
    assert found.action == "stop" and "launch.max_restarts" in found.why
    before[1]["iteration"] = 11  # type: ignore[assignment]
    assert verdict(STUCK, *before).action == "again"


def test_a_lost_node_is_replaced_by_a_spare_one() -> None:
    found = verdict(replace(STUCK, down=("n2",)))
    assert (found.action, found.away, found.cause) == ("again", ("n2",), "lost n2")


def test_without_spare_nodes_the_job_is_requeued_without_the_lost_one() -> None:
    found = verdict(replace(STUCK, down=("n1",)), nodes=("n0", "n1"))
    assert (found.action, found.away) == ("requeue", ("n1",))


def test_a_lost_node_is_a_failure_even_where_srun_says_0() -> None:
    assert verdict(replace(GOOD, down=("n1",))).action == "again"
    assert verdict(replace(GOOD, said=("Node failure on n1",))).action == "again"


def test_two_lost_nodes_in_a_row_are_not_the_same_failure() -> None:
    before = {"cause": "lost n1", "away": ("n1",)}
    assert verdict(replace(STUCK, down=("n2",)), before).action == "again"


def test_a_suspected_machine_is_kept_off() -> None:
    end = replace(STUCK, outcomes=(Failure(3, HARDWARE, "suspects its machine", host="n1"),))
    assert verdict(end).away == ("n1",)
    assert verdict(end, nodes=("n0", "n1")).action == "requeue"


def test_what_slurm_has_requeued_itself_is_left_alone() -> None:
    found = verdict(replace(GOOD, state="PENDING", down=("n0",)))
    assert (found.action, found.away) == ("lost", ("n0",))


@pytest.mark.parametrize("status", [USER_ERROR, HARDWARE])
def test_a_first_preflight_that_finds_too_few_nodes_stops(status: int) -> None:
    found = verdict(replace(STUCK, has_run=False, status=status, outcomes=(), unfit=("n1",)))
    assert (found.action, found.status) == ("stop", status)
    assert found.cause == ("the preflight refused n1" if status == HARDWARE else FAILED)


def test_a_later_one_gives_the_allocation_back_without_them() -> None:
    end = replace(STUCK, status=HARDWARE, outcomes=(), unfit=("n1",))
    found = verdict(end, {"cause": "rank 0: Connection closed"}, nodes=("n0", "n1"))
    assert (found.action, found.away) == ("requeue", ("n1",))


def test_what_the_preflight_refused_stays_off_when_a_rank_fails() -> None:
    found = verdict(replace(STUCK, unfit=("n2",)))
    assert (found.action, found.away) == ("again", ("n2",))


PREFLIGHT = replace(STUCK, has_run=False, outcomes=())
BAD_GPU = replace(PREFLIGHT, outcomes=(Failure(3, HARDWARE, "GPU 1 does not answer", host="n1"),))
DIED = replace(PREFLIGHT, status=139, said=("n1: task 3: Segmentation fault",), alone="n1")


@pytest.mark.parametrize("end", [BAD_GPU, DIED])
def test_a_node_whose_preflight_dies_is_replaced_or_named(end: End) -> None:
    found = verdict(end)
    assert (found.action, found.away) == ("again", ("n1",))
    found = verdict(end, nodes=("n0", "n1"))
    assert (found.action, found.status, found.away) == ("stop", HARDWARE, ("n1",))
    assert "n1" in found.why
    later = verdict(end, {"cause": "other"}, nodes=("n0", "n1"))
    assert (later.action, later.away) == ("requeue", ("n1",))


def test_what_the_peers_of_a_killed_rank_raise_accuses_nobody() -> None:
    raised = Failure(0, HARDWARE, "n0: product: Connection closed by peer", "Traceback", host="n0")
    found = verdict(replace(DIED, outcomes=(raised,), was_killed=True))
    assert (found.action, found.away, found.cause) == ("again", ("n1",), "n1: task 3: Segmentation fault")


def test_a_preflight_that_dies_alike_on_two_nodes_is_no_matter_of_nodes() -> None:
    found = verdict(DIED, {"cause": "n2: task 5: Segmentation fault", "away": ("n2",)})
    assert found.action == "stop" and "same failure twice" in found.why
    assert verdict(replace(DIED, has_run=True)).away == ()  # a training's death says nothing of its node


def test_what_srun_says_counts_where_no_rank_could_speak() -> None:
    found = verdict(
        replace(STUCK, status=137, outcomes=(), said=("n1: task 3: Killed", "n0: task 0: Killed"))
    )
    assert (found.action, found.cause) == ("again", "n1: task 3: Killed")
