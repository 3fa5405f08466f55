"""The fault campaign: breaks a training run in every way we know, and checks what is left of it.

    python scripts/faults.py --count 200 --output docs/faults.md

Each fault befalls a `megatsp train` of its own: a tiny model on two ranks. Afterwards the run must have
ended, with the same losses and the same bits of weights and moments as a run without the fault; every
checkpoint that was good is good; nothing still runs. A fault that never struck has shown nothing: it counts
as a problem too. Exits 1 if one of that does not hold, and says what.
"""

import json
import random
import shutil
import statistics
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from fault_campaign.checks import differences, left_running, lost
from fault_campaign.job import Job, recovery_s, redone, write_corpus
from fault_campaign.kinds import KINDS, SPOILT, Trial, mount, unmount

from megatsp.bench.table import align
from megatsp.parser import Parser

SIZE_MIB = 48  # of a trial's own file system, where a disk can be full


@dataclass(frozen=True)
class Result:
    """What became of one fault. seconds: of the whole trial; recovery_s: to the next iteration, 0 if none."""

    number: int
    kind: str
    restarts: int
    redone: int
    recovery_s: float
    seconds: float
    struck: bool
    problems: list[str]


class Campaign:
    """The references and the place of all trials."""

    def __init__(self, folder: Path, seed: int, limit_s: float) -> None:
        self.folder, self.seed, self.limit_s = folder, seed, limit_s
        self.corpus = folder / "corpus"
        write_corpus(self.corpus)
        self._references: dict[str, Path] = {}
        self._lock = threading.Lock()

    def reference(self, kind: str) -> Path:
        """The run that a kind's runs must equal, made when it is first asked for."""
        name = "spoilt" if kind == "nan-data" else "plain"
        with self._lock:
            if name not in self._references:
                folder = self.folder / f"reference-{name}"
                folder.mkdir()
                job = Job(folder, self.corpus, (), SPOILT if name == "spoilt" else None)
                if job.end(self.limit_s) != 0:
                    raise RuntimeError(f"the run without a fault failed:\n{job.text}")
                self._references[name] = folder / "run"
        return self._references[name]

    def run(self, number: int, kind: str) -> Result:
        """One trial; again with another moment if its own never came, of a rank that saves less often."""
        for attempt in range(4):
            result = self._run(number, kind, attempt)
            if result.struck or result.problems:
                return result
        return replace(result, problems=[f"it never struck, in {attempt + 1} runs"])

    def _run(self, number: int, kind: str, attempt: int) -> Result:
        """One trial, in a file system of its own if it needs one."""
        began = time.time()
        choose = random.Random(f"{self.seed} {number} {kind} {attempt}")
        folder = self.folder / f"{number:04d}-{kind}"
        folder.mkdir()
        if kind == "disk-full" and not mount("-t", "tmpfs", "-o", f"size={SIZE_MIB}m", "faults", str(folder)):
            raise RuntimeError("cannot mount")
        is_async, keep_last = choose.random() < 0.5, choose.choice([0, 2])
        settings = f"checkpoint.async_save={str(is_async).lower()}", f"checkpoint.keep_last={keep_last}"
        trial = Trial(folder, self.corpus, choose, self.limit_s, settings, keep_last)
        try:
            KINDS[kind](trial)
            problems = trial.problems + left_running(folder)
            if not trial.problems:
                problems += lost(trial.checkpoints, set(sorted(trial.good)[-keep_last:]))
                where = folder / "run", self.reference(kind)
                problems += differences(*where, trial.may_lack, keep_last)
            lines = [line for job in trial.jobs for line in job.lines]
            again = redone(lines)
            # A save that is under way in the background when the fault comes is not there afterwards.
            if again > trial.redone_limit + 2 * is_async:
                problems.append(f"{again} iterations were computed again, more than {trial.redone_limit}")
            if problems or not trial.struck:
                text = "\n----\n".join(job.text for job in trial.jobs)
                (self.folder / f"{folder.name}.log").write_text(text)
            return Result(
                number, kind,
                sum("all ranks start again" in line for _, line in lines) + len(trial.jobs) - 1,
                again, recovery_s(lines, trial.struck), time.time() - began,
                bool(trial.struck), problems,
            )  # fmt: skip
        finally:
            if kind == "disk-full":
                unmount(folder)
            shutil.rmtree(folder, ignore_errors=True)


def left_out() -> dict[str, str]:
    """Kinds that this machine does not let us make, and why."""
    with tempfile.TemporaryDirectory() as folder:
        can_mount = mount("-t", "tmpfs", "faults", folder)
        if can_mount:
            unmount(Path(folder))
    return {} if can_mount else dict.fromkeys(("disk-full", "read-only"), "nothing can be mounted here")


def table(results: list[Result]) -> str:
    """In Markdown, a line for each kind."""
    titles = ("fault", "runs", "restarts", "most steps redone", "median seconds to go on", "verdict")
    rows = []
    for kind in KINDS:
        own = [result for result in results if result.kind == kind]
        if not own:
            continue
        failed = sum(bool(result.problems) for result in own)
        idle = sum(not result.struck for result in own)
        verdict = f"{failed} FAILED" + (f", {idle} never struck" if idle else "")
        seconds = [result.recovery_s for result in own if result.recovery_s]
        rows.append(
            [
                kind, str(len(own)), str(sum(result.restarts for result in own)),
                str(max(result.redone for result in own)),
                f"{statistics.median(seconds):.1f}" if seconds else "-",
                verdict if failed else "held",
            ]
        )  # fmt: skip
    return align(titles, rows) + "\n"


def _before(path: Path) -> str:
    """What a file says up to its line `<!-- results`, which stays; what follows is of an earlier campaign."""
    before, mark, after = (path.read_text() if path.exists() else "").partition("<!-- results")
    return f"{before}{mark}{after.partition(chr(10))[0]}\n\n" if mark else ""


def main() -> int:
    parser = Parser("faults.py", description="Breaks training runs and checks what is left of them.")
    parser.add_argument("--count", type=int, default=200, help="faults (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments (default: 0)")
    parser.add_argument("--only", action="append", default=[], metavar="KIND", help="this kind; repeatable")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument("--limit", type=float, default=120.0, help="longest run, seconds (default: 120)")
    parser.add_argument("--output", type=Path, help="a .md file; a .json file stands beside it")
    parser.add_argument("--list", action="store_true", help="print the kinds and end")
    given = parser.parse_args()
    if given.list:
        print("\n".join(KINDS))
        return 0
    if unknown := [kind for kind in given.only if kind not in KINDS]:
        raise ValueError(f"no fault {unknown[0]} (there are: {', '.join(KINDS)})")
    out = left_out()
    for kind, why in out.items():
        print(f"left out: {kind}: {why}")
    kinds = [kind for kind in KINDS if kind not in out and (not given.only or kind in given.only)]
    if not kinds:
        raise ValueError("no fault is left to make")
    order = [kinds[i % len(kinds)] for i in range(given.count)]
    began, results = time.time(), []
    folder = Path(tempfile.mkdtemp(prefix="megatsp-faults-"))
    campaign = Campaign(folder, given.seed, given.limit)
    with ThreadPoolExecutor(given.jobs) as pool:
        pool.submit(campaign.reference, "plain")  # first, so that nothing has to wait for it later
        for result in pool.map(campaign.run, range(len(order)), order):
            results.append(result)
            verdict = "; ".join(result.problems[:3]) or "held"
            print(
                f"{len(results):4d}/{len(order)} {time.time() - began:6.0f} s  {result.kind:18s} "
                f"{result.restarts} restarts, {result.redone} redone, {result.seconds:.1f} s: {verdict}",
                flush=True,
            )
    text = table(results)
    print(f"\n{text}")
    if given.output:
        given.output.write_text(_before(given.output) + text)
        given.output.with_suffix(".json").write_text(
            json.dumps([asdict(r) for r in results], indent=1) + "\n"
        )
    failed = [result for result in results if result.problems]
    for result in failed:
        log = folder / f"{result.number:04d}-{result.kind}.log"
        print(f"FAILED {result.number} {result.kind} (seed {given.seed}); log: {log}")
        print("\n".join(f"  {problem}" for problem in result.problems))
    if not failed:
        shutil.rmtree(folder, ignore_errors=True)
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"faults.py: error: {error}")
