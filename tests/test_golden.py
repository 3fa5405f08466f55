"""Golden runs compute what they computed before, to the bit where the processor and torch are the same."""

from dataclasses import replace

import pytest
from golden_runs import GOLDEN, RUNS, STEPS, Record, difference, prepare, records, this_machine


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Record]:
    return records(prepare(tmp_path_factory.mktemp("golden")), list(RUNS))


@pytest.mark.parametrize("name", RUNS)
def test_a_run_repeats_its_record(found, name):
    golden = Record.read(name)
    bound = 0.0 if golden.made_on == this_machine() else RUNS[name].bound
    assert not difference(found[name], golden, bound), f"made on {golden.made_on}, run on {this_machine()}"


def test_records_are_of_these_runs():
    assert {path.stem for path in GOLDEN.glob("*.json")} == RUNS.keys()
    for name, run in RUNS.items():
        assert Record.read(name).run == {"ranks": run.ranks, "settings": [*run.settings]}


def test_runs_differ_from_each_other_by_rounding_alone():
    """Those that compute the same function of the same samples: no record holds a mistake of its scheme."""
    dense = Record.read("dense")
    other = ("lora", "packed", "bf16")
    for name in RUNS.keys() - {*other}:
        assert not difference(replace(Record.read(name), state=dense.state), dense, 2e-6), name
    for name in other[:2]:
        assert difference(Record.read(name), dense, 1e-3), name
    assert not difference(Record.read("bf16"), dense, 1e-2) and difference(Record.read("bf16"), dense, 1e-6)


def test_a_difference_is_named():
    golden = Record.read("dense")
    assert not difference(golden, golden, 0.0)
    other = replace(golden, losses=[*golden.losses[: STEPS - 1], golden.losses[-1] * (1 + 5e-7)])
    assert difference(other, golden, 0.0).startswith(f"losses[{STEPS - 1}] is ")
    assert not difference(other, golden, 1e-6)
    assert difference(replace(golden, gradient_norms=[float("nan")] * STEPS), golden, 1e-6)
    assert "weights or moments" in difference(replace(golden, state=""), golden, 0.0)
