"""The tests themselves: none depends on the clock, on the load of the machine, or on the order of files."""

import ast
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from waiting import LIMIT_S

TESTS = Path(__file__).parent
CLOCKS = {
    "sleep", "time", "time_ns", "monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns",
    "process_time", "thread_time", "clock_gettime",
}  # fmt: skip
ALLOWED = {
    "waiting.py": "what all others wait by",
    "doctor/test_doctor_checks.py": "another clock than this host's is made of this host's",
    "kernels/test_streamed.py": "ranks sleep at random, so that they meet in many orders, and each must do",
    "preflight/test_preflight_roll_call.py": "the host of a roll call is given a deadline by this clock",
    "training/test_stopping.py": "what is tested reads the same clock between two looks at it",
}


def uses_of_clocks(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Lines in which something reads a clock, sleeps, sets a timer, or waits for so many seconds at most."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if (node.value.id == "time" and node.attr in CLOCKS) or node.attr == "Timer":
                yield node.lineno, f"{node.value.id}.{node.attr}"
        elif isinstance(node, ast.ImportFrom) and node.module in ("time", "datetime"):
            yield node.lineno, f"from {node.module} import"
        elif isinstance(node, ast.keyword) and node.arg == "timeout" and is_number(node.value):
            yield node.value.lineno, f"timeout={ast.unparse(node.value)}"


def is_number(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, int | float)


def test_no_test_reads_a_clock():
    found: dict[str, list[str]] = {}
    for file in sorted(TESTS.rglob("*.py")):
        name = str(file.relative_to(TESTS))
        for line, what in uses_of_clocks(ast.parse(file.read_text())):
            found.setdefault(name, []).append(f"{name}:{line}: {what}")
    wrong = [text for name, texts in found.items() if name not in ALLOWED for text in texts]
    assert wrong == [], "use wait_until, LIMIT_S or a clock that the test moves: see tests/waiting.py"
    assert ALLOWED.keys() <= found.keys(), "these need no exception any more"


@pytest.mark.parametrize(
    "line",
    [
        "time.sleep(1)", "x = time.monotonic() + 3", "threading.Timer(1, f)", "from time import sleep",
        "job.communicate(timeout=60)", "clock = time.perf_counter", "from datetime import datetime",
    ],
)  # fmt: skip
def test_uses_of_clocks_are_found(line):
    assert len(list(uses_of_clocks(ast.parse(line)))) == 1


def test_a_limit_of_a_wait_strikes_before_that_of_its_test(pytestconfig):
    assert LIMIT_S >= 300 and float(pytestconfig.getini("timeout")) > LIMIT_S


def test_a_seed_is_an_order_of_files(pytestconfig):
    conftest = pytestconfig.pluginmanager.get_plugin(str(TESTS / "conftest.py"))
    items = [SimpleNamespace(path=file, name=name) for file in "abcdefgh" for name in (1, 2, 3)]
    orders = [conftest.in_random_order_of_files(items, seed) for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2] and orders[0] != items
    for order in orders:
        files = list(dict.fromkeys(item.path for item in order))
        assert sorted(files) == list("abcdefgh")
        assert [(item.path, item.name) for item in order] == [(file, n) for file in files for n in (1, 2, 3)]
