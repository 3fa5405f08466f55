"""The mutants: that each still applies, that tests are known for it, and that what is said of one is true."""

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import mutants as command  # noqa: E402  # of scripts/, which is no package of ours
from mutant_runs import coverage  # noqa: E402
from mutant_runs.mutants import DoesNotApply, Mutant, Tree, load_mutants  # noqa: E402

MUTANTS = load_mutants()
KINDS = {
    "sign", "chunk", "reduction", "buffer", "scale", "mask", "cast", "border", "moment", "checksum", "lock",
    "swallowed error", "schedule", "per micro-batch", "adapter's scale", "rank order", "last column", "group",
    "limit",
}  # fmt: skip


@pytest.fixture(scope="module")
def tree():
    return Tree(ROOT)


def test_every_mutant_applies_once(tree):
    for mutant in MUTANTS:
        path, text = tree.mutated(mutant)
        assert text != path.read_text()
        assert tree.probed(mutant)


def test_there_are_enough_of_every_kind():
    assert len(MUTANTS) >= 80
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    assert {mutant.kind for mutant in MUTANTS} == KINDS
    assert all(re.fullmatch(r"[\w.]+: .+", mutant.name) for mutant in MUTANTS)


def test_the_documentation_names_every_kind():
    text = (ROOT / "docs" / "testing.md").read_text()
    assert [kind for kind in sorted(KINDS) if f"| {kind} |" not in text] == []


def test_covering_tests_are_known_and_there():
    table = coverage.load_table()
    assert [mutant.name for mutant in MUTANTS if not table.get(mutant.name)] == []
    assert coverage.missing_tests(ROOT, table) == []


SOURCE = '''\
"""A module."""


def total(numbers, start=0):
    """Their sum."""
    for number in numbers:  # one after the other
        start = start + number
    return start


class Counter:
    def total(self, numbers):
        return len(numbers) + 0
'''
TESTS = """\
from megatsp.sums import Counter, total


def test_total():
    assert total([1, 2]) == 3


def test_counter():
    assert Counter().total([1, 2]) == 2


def test_that_always_fails():
    assert total([]) == 1
"""
FAULTS = """\
sums:
  - {name: 'total: subtracts', kind: sign, find: 'start  +number', replace: 'start - number'}
  - {name: 'total: adds the other way round', kind: sign, find: 'start + number', replace: 'number + start'}
  - {name: 'Counter.total: counts one more', kind: scale, find: '+ 0', replace: '+ 1'}
"""


@pytest.fixture
def small_tree(tmp_path):
    """A tree like ours with one module, its tests, of which one always fails, and three mutants."""
    root = tmp_path / "root"
    for folder in ("megatsp", "kernels/megatsp_kernels", "tests"):
        (root / folder).mkdir(parents=True)
    for package in ("megatsp", "kernels/megatsp_kernels"):
        (root / package / "__init__.py").touch()
    (root / "megatsp" / "sums.py").write_text(SOURCE)
    (root / "tests" / "test_sums.py").write_text(TESTS)
    (tmp_path / "mutants.yaml").write_text(FAULTS)
    return root


def run(root, *arguments):
    """scripts/mutants.py on the small tree: its exit status, and what --json has by the mutant's name."""
    folder = root.parent
    files = ["--mutants", str(folder / "mutants.yaml"), "--table", str(folder / "table.json")]
    status = command.main(["--tree", str(root), *files, "--json", str(folder / "results.json"), *arguments])
    results = folder / "results.json"
    entries = json.loads(results.read_text()) if results.exists() else []
    return status, {entry["name"]: entry for entry in entries}


def test_kills_and_survivors(small_tree, capsys):
    assert run(small_tree, "--coverage") == (0, {})
    table = coverage.load_table(small_tree.parent / "table.json")
    assert table["Counter.total: counts one more"] == ["tests/test_sums.py::test_counter"]
    assert {*table["total: subtracts"]} == {
        "tests/test_sums.py::test_total", "tests/test_sums.py::test_that_always_fails"
    }  # fmt: skip
    status, results = run(small_tree, "--quick")
    assert status == 1
    assert {name: entry["verdict"] for name, entry in results.items()} == {
        "total: subtracts": "killed",
        "total: adds the other way round": "survived",  # a test that fails without the fault says nothing
        "Counter.total: counts one more": "killed",
    }
    assert results["total: subtracts"]["by"] == "tests/test_sums.py::test_total"
    assert "survived: total: adds the other way round" in capsys.readouterr().out
    assert (small_tree / "megatsp" / "sums.py").read_text() == SOURCE
    # What was judged is not judged again, and the exit status of kills alone is 0.
    assert run(small_tree, "--quick", "--only", "Counter.total")[0] == 0
    assert capsys.readouterr().out == "1 killed of 1\n"


def test_a_mutant_that_does_not_apply_is_an_error(small_tree, capsys):
    assert run(small_tree, "--check") == (0, {})
    (small_tree / "megatsp" / "sums.py").write_text(SOURCE.replace("+ 0", "+ 0 + 0"))
    assert run(small_tree, "--quick") == (1, {})
    assert "Counter.total: counts one more: found 2 times, not once: + 0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "find", "replace", "message"),
    [
        ("add: subtracts", "a", "b", "no function is called add"),
        ("total: subtracts", "start * number", "b", "found 0 times"),
        ("total: subtracts", "start + number", "start  + number", "it changes nothing"),
        ("total: subtracts", "start + number", "start +", "is no Python"),
    ],
)
def test_what_is_wrong_with_a_mutant_is_said(small_tree, name, find, replace, message):
    with pytest.raises(DoesNotApply, match=message):
        Tree(small_tree).mutated(Mutant("sums", name, "sign", find, replace))


def test_neither_a_reformatting_nor_a_move_loses_a_mutant(small_tree):
    (small_tree / "megatsp" / "sums.py").rename(small_tree / "kernels" / "megatsp_kernels" / "moved.py")
    moved = small_tree / "kernels" / "megatsp_kernels" / "moved.py"
    moved.write_text(
        SOURCE.replace(
            "start + number", "(\n            start  # so far\n            + number,\n        )[0]"
        )
    )
    mutant = Mutant("sums", "total: subtracts", "sign", "start + number", "start - number")
    path, text = Tree(small_tree).mutated(mutant)
    assert path == moved and "start - number,\n        )[0]" in text
