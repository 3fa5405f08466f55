"""Proves that the suite catches faults: makes small ones in copies of the tree, and runs the tests on each.

    python scripts/mutants.py --jobs 2 --json mutants.json

A mutant is one fault, named by its function and its effect; scripts/mutant_runs/mutants.yaml lists them.
First those tests run that enter its function, as the table of --coverage says; then, if they pass, the whole
suite. A kill counts only if the test passes without the fault. Exits 1 if a mutant survives or no longer
applies, and names it.
"""

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path

from mutant_runs import coverage
from mutant_runs.copies import ALL_PASSED, SOME_FAILED, Copy
from mutant_runs.judge import SEEN, Judge, Result, result_of
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
    parser.add_argument("--jobs", type=int, default=1, help="copies that are worked in at a time")
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
        return _make_table(root, mutants, args.table, args.hits, args.junit)
    return _judge_all(root, mutants, args)


def _is_meant(mutant: Mutant, only: Sequence[str] | None) -> bool:
    names = (mutant.name, mutant.function, mutant.area)
    return not only or any(fnmatch(name, pattern) or name == pattern for name in names for pattern in only)


def _problems(tree: Tree, mutants: Iterable[Mutant]) -> Iterable[str]:
    for mutant in mutants:
        try:
            tree.mutated(mutant)
            tree.probed(mutant)
        except DoesNotApply as error:
            yield str(error)


def _make_table(
    root: Path, mutants: Sequence[Mutant], table: Path, hits: Path | None, junit: Path | None
) -> int:
    status: int | None = ALL_PASSED
    with tempfile.TemporaryDirectory(prefix="mutants_") as name:
        if hits is None:
            hits, junit = Path(name) / "hits", Path(name) / "junit.xml"
            with Copy(root, Path(name) / "0") as copy:
                coverage.put_probes(copy, Tree(copy.folder), mutants, hits)
                run = copy.test(["-n", "2", "--dist", "loadfile", f"--junitxml={junit}"], limit_s=7200)
            status = run.status
            print("\n".join(run.output.splitlines()[-40:]))
        seconds = coverage.seconds_of(junit) if junit is not None and junit.exists() else {}
        found = coverage.table_of(Tree(root), mutants, hits, seconds)
    coverage.write_table({**coverage.load_table(table), **found}, table)
    for mutant in mutants:
        if not found[mutant.name]:
            print(f"no test enters the function: {mutant.name}")
    return 0 if status in (ALL_PASSED, SOME_FAILED) else 1


def _judge_all(root: Path, mutants: list[Mutant], args: "object") -> int:
    options = vars(args)
    results: dict[str, Result] = {}
    output: Path | None = options["json"]
    if output is not None and output.exists():
        known = {entry["name"]: result_of(entry) for entry in json.loads(output.read_text())}
        results = {
            m.name: known[m.name] for m in mutants if m.name in known and known[m.name].change == m.change
        }
    with tempfile.TemporaryDirectory(prefix="mutants_") as name, ExitStack() as stack:
        table = coverage.load_table(options["table"])
        judge = Judge(root, Path(name), table, options["limit"], options["quick"])
        for number in range(options["jobs"]):
            judge.give(stack.enter_context(Copy(root, Path(name) / str(number))))
        waiting = [mutant for mutant in mutants if mutant.name not in results]
        new: dict[str, Result] = {}
        while waiting:
            with ThreadPoolExecutor(options["jobs"]) as pool:
                futures = [pool.submit(judge.judge, mutant) for mutant in waiting]
                for future in as_completed(futures):
                    result = future.result()
                    new[result.name] = results[result.name] = result
                    _say(len(results), len(mutants), result)
                    if output is not None:
                        output.write_text(json.dumps([asdict(r) for r in results.values()], indent=1) + "\n")
            again = {result.name for result in judge.unconfirmed(new.values())}
            for result_name in again:
                print(
                    f"judged again, the test fails without the fault too: {new[result_name].by}", flush=True
                )
            new = {key: result for key, result in new.items() if key not in again}
            waiting = [mutant for mutant in mutants if mutant.name in again]
    return _sum_up([results[mutant.name] for mutant in mutants])


def _say(done: int, total: int, result: Result) -> None:
    by = f" by {result.by}" if result.by else ""
    print(f"{done:3}/{total} {result.verdict} in {result.seconds:.0f} s: {result.name}{by}", flush=True)


def _sum_up(results: Sequence[Result]) -> int:
    counts = Counter(result.verdict for result in results)
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()), f"of {len(results)}")
    left = [result for result in results if result.verdict not in SEEN]
    for result in left:
        print(f"{result.verdict}: {result.name}{f' ({result.by})' if result.by else ''}")
    return bool(left)


if __name__ == "__main__":
    sys.exit(main())
