"""Proves that the suite catches faults: makes small ones in copies of the tree, and runs the tests on each.

    python scripts/mutants.py --jobs 2 --json mutants.json

A mutant is one fault, named by its function and its effect; scripts/mutant_runs/mutants.yaml lists them.
First those tests run that enter its function, as the table of --coverage says; then, if they pass, the whole
suite. A kill counts only if the test passes without the fault. Exits 1 if a mutant survives or no longer
applies, and names it.
"""

import json
import signal
import sys
import tempfile
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path

from mutant_runs import coverage
from mutant_runs.copies import ALL_PASSED, SOME_FAILED, Copy
from mutant_runs.judge import SEEN, Judge, Result
from mutant_runs.mutants import HERE, DoesNotApply, Mutant, Tree, load_mutants

from megatsp.parser import Parser

ROOT = HERE.parents[1]


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="mutants.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--list", action="store_true", help="the mutants and what they are, then nothing")
    parser.add_argument("--check", action="store_true", help="only whether every mutant applies")
    parser.add_argument("--coverage", action="store_true", help="make the table of covering tests anew")
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="mutants of this name, function, area or glob alone"
    )
    parser.add_argument("--jobs", type=int, default=1, help="copies, or processes of --coverage, at a time")
    parser.add_argument("--quick", action="store_true", help="no whole suite after the covering tests")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="results; those that it has are not judged again"
    )
    parser.add_argument("--limit", type=float, default=1200, metavar="S", help="after which tests are ended")
    parser.add_argument("--tree", type=Path, default=ROOT, help="what is copied (default: this checkout)")
    parser.add_argument("--mutants", type=Path, default=HERE / "mutants.yaml", help="the table of mutants")
    parser.add_argument("--table", type=Path, default=coverage.TABLE, help="the table of covering tests")
    parser.add_argument("--hits", type=Path, help="with --coverage: what a run of the suite with probes left")
    parser.add_argument(
        "--junit", type=Path, help="with --hits: that run's --junitxml, for how long tests take"
    )
    args = parser.parse_args(argv)
    root = args.tree.resolve()
    mutants = [m for m in load_mutants(args.mutants) if _is_meant(m, args.only)]
    if not mutants:
        parser.error("--only: no mutant has such a name (--list)")
    if args.list:
        for mutant in mutants:
            print(f"{mutant.area:14} {mutant.kind:16} {mutant.name}")
        return 0
    problems = list(_problems(Tree(root), mutants))
    if args.check or problems:
        print("\n".join(problems) or f"{len(mutants)} mutants apply")
        return bool(problems)
    if args.coverage:
        return _make_table(root, mutants, args)
    return _judge_all(root, mutants, args)


def _is_meant(mutant: Mutant, only: Sequence[str] | None) -> bool:
    names = (mutant.name, mutant.function, mutant.area)
    return not only or any(fnmatch(name, pattern) or name == pattern for name in names for pattern in only)


def _problems(tree: Tree, mutants: Iterable[Mutant]) -> Iterator[str]:
    for mutant in mutants:
        try:
            tree.mutated(mutant)
            tree.probed(mutant)
        except DoesNotApply as error:
            yield str(error)


def _make_table(root: Path, mutants: Sequence[Mutant], args: Namespace) -> int:
    hits, junit, status = args.hits, args.junit, ALL_PASSED
    with tempfile.TemporaryDirectory(prefix="mutants_") as name:
        if hits is None:
            hits, junit = Path(name) / "hits", Path(name) / "junit.xml"
            with Copy(root, Path(name) / "0") as copy:
                coverage.put_probes(copy, Tree(copy.folder), mutants, hits)
                jobs = str(args.jobs if args.jobs > 1 else 0)
                run = copy.test(["-n", jobs, "--dist", "loadfile", f"--junitxml={junit}"], limit_s=7200)
            status = run.status
            print("\n".join(run.output.splitlines()[-40:]))
        seconds = coverage.seconds_of(junit) if junit is not None and junit.exists() else {}
        found = coverage.table_of(Tree(root), mutants, hits, seconds)
    coverage.write_table({**coverage.load_table(args.table), **found}, args.table)
    for mutant in mutants:
        if not found[mutant.name]:
            print(f"no test enters the function: {mutant.name}")
    return 0 if status in (ALL_PASSED, SOME_FAILED) else 1


def _judge_all(root: Path, mutants: list[Mutant], args: Namespace) -> int:
    results = _known(args.json, args.mutants)
    with tempfile.TemporaryDirectory(prefix="mutants_") as name, ExitStack() as stack:
        judge = Judge(root, Path(name), coverage.load_table(args.table), args.limit, args.quick)
        for number in range(args.jobs):
            judge.give(stack.enter_context(Copy(root, Path(name) / str(number))))
        while waiting := [mutant for mutant in mutants if mutant.name not in results]:
            for result in _judged(judge, waiting, args.jobs):
                results[result.name] = result
                _say(sum(m.name in results for m in mutants), len(mutants), result)
                _write(args.json, results)
            kills, doubtful = judge.confirm([results[mutant.name] for mutant in mutants])
            for result in doubtful:
                print(f"judged again, as the test fails without the fault too: {result.by}", flush=True)
                del results[result.name]
            results |= {result.name: result for result in kills}
            _write(args.json, results)
    return _sum_up([results[mutant.name] for mutant in mutants])


def _known(path: Path | None, table: Path) -> dict[str, Result]:
    """The results of an earlier call, of mutants that are still the same."""
    if path is None or not path.exists():
        return {}
    changes = {mutant.name: mutant.change for mutant in load_mutants(table)}
    found = [Result(**entry) for entry in json.loads(path.read_text())]
    return {result.name: result for result in found if changes.get(result.name) == result.change}


def _judged(judge: Judge, mutants: Sequence[Mutant], jobs: int) -> Iterator[Result]:
    """Results as they come. An interruption ends what runs."""
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(judge.judge, mutant) for mutant in mutants]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            judge.stop()
            raise


def _write(output: Path | None, results: Mapping[str, Result]) -> None:
    if output is not None:
        output.write_text(json.dumps([asdict(result) for result in results.values()], indent=1) + "\n")


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _say(done: int, total: int, result: Result) -> None:
    by = f" by {result.by}" if result.by else ""
    why = f" ({result.why[:120]})" if result.why else ""
    print(f"{done:3}/{total} {result.verdict} in {result.seconds:.0f} s: {result.name}{by}{why}", flush=True)


def _sum_up(results: Sequence[Result]) -> int:
    counts = Counter(result.verdict for result in results)
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()), f"of {len(results)}")
    left = [result for result in results if result.verdict not in SEEN]
    for result in left:
        print(f"{result.verdict}: {result.name}{f' ({result.why})' if result.why else ''}")
    return bool(left)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupt)  # so that what runs is ended, and the copies are removed
    sys.exit(main())
