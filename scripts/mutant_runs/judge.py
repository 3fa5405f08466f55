"""What the tests say of a mutant."""

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue

from mutant_runs.copies import ALL_PASSED, INTERRUPTED, NONE_RUN, SOME_FAILED, Copy, Run
from mutant_runs.coverage import Table
from mutant_runs.mutants import Mutant, Tree

KILLED, TIMED_OUT, SURVIVED, NOT_COVERED, UNSOUND = (
    "killed",
    "timed out",
    "survived",
    "not covered",
    "unsound",
)
SEEN = (KILLED, TIMED_OUT)  # verdicts of a mutant that the suite catches
_OF_TIME = ("TimeoutError", "Failed: Timeout")  # what ends a test that hangs, or a machine that is too busy
WHOLE_SUITE = ["-n", "2", "--dist", "loadfile"]


@dataclass(frozen=True)
class Result:
    """What became of one mutant.

    by: the test that failed. why: what pytest says of it in a line, or why the mutant is unsound. stage: the
    covering tests, or the whole suite. tests: how many were run. change: what was replaced by what.
    is_confirmed: the test passes without it.
    """

    name: str
    verdict: str
    by: str
    why: str
    stage: str
    tests: int
    seconds: float
    change: list[str]
    is_confirmed: bool = False


class Judge:
    """Makes mutants in copies of a tree, one in each at a time, and runs tests."""

    def __init__(self, root: Path, folder: Path, table: Table, limit_s: float, quick: bool) -> None:
        self._root, self._folder, self._table, self._quick = root, folder, table, quick
        self._limit_s = limit_s
        self._tree = Tree(root)
        self._sound: set[str] = set()  # tests that pass without a fault
        self._not_to_blame: set[str] = set()  # and those that fail
        self._copies: list[Copy] = []
        self._free: SimpleQueue[Copy] = SimpleQueue()
        self._lock = threading.Lock()

    def give(self, copy: Copy) -> None:
        """One copy more to work in."""
        self._copies.append(copy)
        self._free.put(copy)

    def stop(self) -> None:
        """Ends what runs, when nobody waits for it any more."""
        for copy in self._copies:
            copy.stop()

    def judge(self, mutant: Mutant) -> Result:
        """What the tests say of one mutant; in any thread."""
        copy = self._free.get()
        try:
            copy.write(*self._tree.mutated(mutant))
            return self._judged(mutant, copy)
        finally:
            copy.restore()
            self._free.put(copy)

    def _judged(self, mutant: Mutant, copy: Copy) -> Result:
        stages: list[tuple[str, list[str]]] = []
        if tests := self._table.get(mutant.name):
            stages.append(("covering tests", tests))
        if not self._quick:
            stages.append(("whole suite", WHOLE_SUITE))
        count, seconds = 0, 0.0
        for stage, arguments in stages:
            run = self._run(copy, arguments, self._limit_s * (1 if stage == "covering tests" else 4))
            count, seconds = count + run.tests, seconds + run.seconds
            verdict, by, why = _verdict(run)
            if verdict != SURVIVED:
                return Result(mutant.name, verdict, by, why, stage, count, seconds, mutant.change)
        return Result(
            mutant.name, SURVIVED if stages else NOT_COVERED, "", "", stages[-1][0] if stages else "", count,
            seconds, mutant.change,
        )  # fmt: skip

    def _run(self, copy: Copy, arguments: Sequence[str], limit_s: float) -> Run:
        with self._lock:
            ignored = sorted(self._not_to_blame)
        return copy.test(["-x", *(f"--deselect={test}" for test in ignored), *arguments], limit_s)

    def confirm(self, results: Iterable[Result]) -> tuple[list[Result], list[Result]]:
        """Of the kills not confirmed yet, those whose test passes without the fault, and the others.

        The tests of the others are left out from now on: they say nothing.
        """
        killed = [r for r in results if r.verdict in SEEN and r.by and not r.is_confirmed]
        tests = sorted({result.by for result in killed} - self._sound)
        failed: set[str] = set()
        if tests:
            copy = self._free.get()
            try:
                run = copy.test(tests, self._limit_s * 4)
            finally:
                self._free.put(copy)
            if run.status not in (ALL_PASSED, SOME_FAILED):
                raise RuntimeError(f"the tests do not run without a fault either:\n{run.output[-3000:]}")
            failed = {test for test in tests if any(_is_case(case, test) for case in run.failed)}
        self._not_to_blame |= failed
        self._sound |= {*tests} - failed
        kills = [replace(result, is_confirmed=True) for result in killed if result.by in self._sound]
        return kills, [result for result in killed if result.by not in self._sound]


def _verdict(run: Run) -> tuple[str, str, str]:
    """The verdict, the test that failed, and why."""
    if run.status is None:
        return TIMED_OUT, "", "the tests were ended by the limit"
    if run.status in (ALL_PASSED, NONE_RUN):
        return SURVIVED, "", ""
    if run.status == SOME_FAILED and run.failed:
        test, why = next(iter(run.failed.items()))
        return (TIMED_OUT if why.startswith(_OF_TIME) else KILLED), test, why
    if run.status == INTERRUPTED:
        return UNSOUND, "", f"tests cannot be collected: {_last_lines(run.output)}"
    return UNSOUND, "", f"pytest ended with {run.status}: {_last_lines(run.output)}"


def _is_case(case: str, test: str) -> bool:
    return case == test or case.startswith(f"{test}[")


def _last_lines(output: str) -> str:
    return " | ".join(output.strip().splitlines()[-3:])[-500:]
