"""Which tests enter the functions that mutants are in: found by a probe in each, kept in a table.

A probe is one line at a function's beginning. It adds the running test, as pytest's PYTEST_CURRENT_TEST names
it, to a file: so it works in the ranks and processes that a test starts, which inherit that variable. What
outlives a test, such as a pool of ranks, has to set it anew for each.
"""

import ast
import json
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from mutant_runs.copies import Copy
from mutant_runs.mutants import HERE, Function, Mutant, Tree

TABLE = HERE / "seen_by.json"
# Tests that are kept of a mutant: of the file that mirrors its module, before all of that file; of all
# others; and of each of those, as long as there are more.
OF_ITS_OWN, OF_OTHERS, OF_A_FILE = 6, 9, 3
_PROBE = "_megatsp_probe"
_PROBE_TEXT = """\
import os

_SEEN = set()


def hit(name):
    test = os.environ.get("PYTEST_CURRENT_TEST", "")
    if (test, name) not in _SEEN:
        _SEEN.add((test, name))
        file = os.open({hits!r}, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.write(file, f"{{test}}\\t{{name}}\\n".encode())
        os.close(file)
"""
Table = dict[str, list[str]]  # tests, or whole files, the most telling first, by mutant


def put_probes(copy: Copy, tree: Tree, mutants: Iterable[Mutant], hits: Path) -> None:
    """Writes a probe into every function that a mutant is in, or is seen by. tree: of the copy."""
    by_file: defaultdict[Path, dict[str, Function]] = defaultdict(dict)
    for mutant in mutants:
        for function in tree.probed(mutant):
            by_file[function.path][function.qualname] = function
    for path, functions in by_file.items():
        lines = path.read_text().splitlines(keepends=True)
        for function in sorted(functions.values(), key=lambda f: f.node.lineno, reverse=True):
            statement = _first_statement(function)
            lines.insert(
                statement - 1,
                f'{_indent(lines[statement - 1])}__import__("{_PROBE}").hit("{_key(function)}")\n',
            )
        copy.write(path, "".join(lines))
    (copy.folder / f"{_PROBE}.py").write_text(_PROBE_TEXT.format(hits=str(hits)))


def table_of(tree: Tree, mutants: Sequence[Mutant], hits: Path, seconds: Mapping[str, float]) -> Table:
    """Of each mutant the tests that enter its function: first those of its module, then of every file a few.

    Among them those come first that enter few other functions and are short.
    """
    entered: defaultdict[str, set[str]] = defaultdict(set)  # tests by function
    breadth: Counter[str] = Counter()
    with hits.open(errors="replace") as file:
        for line in file:
            test, _, key = line.rstrip("\n").partition("\t")
            test = without_parameters(test)
            if test and test not in entered[key]:
                entered[key].add(test)
                breadth[test] += 1
    table = {}
    for mutant in mutants:
        functions = tree.probed(mutant)
        tests = {test for function in functions for test in entered[_key(function)]}
        cost = {test: breadth[test] * (1.0 + seconds.get(test, 1.0)) for test in tests}
        modules = {function.path.stem for function in functions} | {tree.place(mutant)[0].path.stem}
        table[mutant.name] = _chosen(sorted(tests, key=lambda test: (cost[test], test)), modules)
    return table


def _chosen(tests: Sequence[str], modules: Iterable[str]) -> list[str]:
    """The first of the modules' own files, then those files, then the first of the others, few of a file."""
    endings = tuple(f"_{module}.py" for module in modules)  # tests/ mirrors the source
    own = [test for test in tests if test.partition("::")[0].endswith(endings)]
    files = {test.partition("::")[0] for test in own[OF_ITS_OWN:]}
    others = _spread([test for test in tests if test not in own])
    return [*own[:OF_ITS_OWN], *sorted(files), *others[:OF_OTHERS]]


def _spread(tests: Sequence[str]) -> list[str]:
    """All of them, few of a file in turn: what one file misses, another may see."""
    rounds: defaultdict[int, list[str]] = defaultdict(list)
    seen: Counter[str] = Counter()
    for test in tests:
        file = test.partition("::")[0]
        rounds[seen[file] // OF_A_FILE].append(test)
        seen[file] += 1
    return [test for _, some in sorted(rounds.items()) for test in some]


def without_parameters(test: str) -> str:
    """The id of a test, as "tests/x.py::test_y[1-a] (call)" names one of its cases."""
    name = test.rpartition(" (")[0] if test.endswith(")") else test
    file, _, case = name.partition("::")
    return f"{file}::{case.partition('[')[0]}" if case else ""


def seconds_of(junit: Path) -> dict[str, float]:
    """How long each test took, all its cases together, from pytest's --junitxml."""
    found: Counter[str] = Counter()
    for case in ElementTree.parse(junit).iter("testcase"):
        path = case.get("classname", "").replace(".", "/")
        found[without_parameters(f"{path}.py::{case.get('name', '')}")] += float(case.get("time", 0))
    return dict(found)


def load_table(path: Path = TABLE) -> Table:
    """The ids of tests by mutant; on disk they are grouped by file."""
    content = json.loads(path.read_text()) if path.exists() else {}
    return {
        name: [f"{file}::{test}" if test else file for file, tests in files.items() for test in tests]
        for name, files in content.items()
    }


def write_table(table: Table, path: Path = TABLE) -> None:
    """A line for each mutant and file."""
    content: dict[str, dict[str, list[str]]] = {}
    for name, tests in table.items():
        files = content.setdefault(name, {})
        for test in tests:
            file, _, case = test.partition("::")
            files.setdefault(file, []).append(case)
    entries = [
        f" {json.dumps(name)}: {{\n"
        + ",\n".join(f"  {json.dumps(file)}: {json.dumps(cases)}" for file, cases in files.items())
        + "\n }"
        for name, files in content.items()
    ]
    path.write_text("{\n" + ",\n".join(entries) + "\n}\n")


def missing_tests(root: Path, table: Table) -> list[str]:
    """The tests of the table that are not in the tree any more."""
    defined: dict[str, set[str]] = {}
    missing = []
    for test in sorted({test for tests in table.values() for test in tests}):
        file, _, name = test.partition("::")
        if file not in defined:
            path = root / file
            nodes = ast.walk(ast.parse(path.read_text())) if path.exists() else ()
            defined[file] = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
        if not defined[file] or (name and name not in defined[file]):
            missing.append(test)
    return missing


def _key(function: Function) -> str:
    return f"{function.module}:{function.qualname}"


def _first_statement(function: Function) -> int:
    """The line of the first statement after the docstring, decorators of an inner function included."""
    body = function.node.body
    has_docstring = isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
    statement = body[1 if has_docstring and len(body) > 1 else 0]
    return min([statement.lineno, *(d.lineno for d in getattr(statement, "decorator_list", []))])


def _indent(line: str) -> str:
    return line[: len(line) - len(line.lstrip())]
