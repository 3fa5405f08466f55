"""Every kernel passes the gate on every chip, and the gate refuses what it should."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from dying import dying_job
from megatsp_kernels import registry
from megatsp_kernels.aot import compile_variant
from waiting import LIMIT_S

ROOT = Path(__file__).resolve().parents[2]


def compiling(*arguments: str, timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Runs Python where kernels compile: this process interprets them."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *sys.path])
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


@pytest.mark.timeout(3 * LIMIT_S)
def test_every_kernel_passes_the_gate_on_every_chip(tmp_path):
    """All of them, unless docs/benchmarks/aot.md says that these very sources passed: then a sample."""
    file = tmp_path / "aot.json"
    found = compiling(
        "scripts/aot_report.py", "--check", "--known", "--json", str(file), timeout_s=3 * LIMIT_S
    )
    assert found.returncode == 0, found.stdout + found.stderr[-2000:]
    rows = json.loads(file.read_text())
    assert {row["job"]["op"] for row in rows} == {*registry.OPS}
    assert {row["job"]["target"] for row in rows} == {"gfx942", "gfx950", "sm_90"}
    assert all(row["compiled"]["registers"] > 0 and row["compiled"]["code_bytes"] > 0 for row in rows)


@pytest.fixture(scope="module")
def judged() -> dict[str, dict[str, list[str]]]:
    found = compiling("tests/kernels/violations.py", timeout_s=LIMIT_S)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


@pytest.mark.parametrize("target", ["gfx942", "sm_90"])
@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("spills", "bytes of scratch a lane"),
        ("too much shared memory", "bytes of shared memory; "),
        ("relaxed wait", "no acquire and release at system scope"),
        ("wait on this GPU alone", "no acquire and release at system scope"),
        ("no matrix instructions", "has no matrix instructions"),
        ("atomic sum", "adds floating-point numbers atomically"),
        ("does not compile", "does not compile: CompilationError: arange's range must be a power of 2"),
    ],
)
def test_a_kernel_that_breaks_a_rule_is_reported(judged, target, label, expected):
    assert any(expected in problem for problem in judged[target][label])


def test_registers_that_spill_are_counted_on_amd(judged):
    kinds = [problem.split()[2:4] for problem in judged["gfx942"]["spills"] if "spills" in problem]
    assert kinds == [["vector", "registers:"], ["scalar", "registers:"]]


@pytest.mark.parametrize("target", ["gfx942", "sm_90"])
def test_sound_kernels_have_no_problems(judged, target):
    sound = {label: problems for label, problems in judged[target].items() if label.startswith("sound")}
    assert sound == {"sound product": [], "sound wait": []}


def test_an_interpreting_process_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    _, variant = next(registry.variants("gfx942"))
    with pytest.raises(ValueError, match="TRITON_INTERPRET is set.*start Python without it"):
        compile_variant(variant, "gfx942")


@pytest.fixture
def report(monkeypatch):
    """scripts/aot_report.py as a module, where Triton is not asked to interpret."""
    for op in registry.OPS:  # first: a kernel is what it was when its module was imported
        registry.load(op, "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.syspath_prepend(ROOT / "scripts")  # for its workers, too
    return importlib.import_module("aot_report")


def test_a_problem_sets_the_exit_code(report, monkeypatch, capsys):
    def compile_all(jobs):
        return [report.Row(job, "kernel", "4 warps", None, ["spills 3 vector registers"]) for job in jobs]

    monkeypatch.setattr(report, "compile_all", compile_all)
    assert report.main(["--check", "--op", "swiglu", "--target", "sm_90"]) == 1
    assert "kernel, sm_90 [4 warps]: spills 3 vector registers" in capsys.readouterr().out


def test_the_page_is_known_until_a_kernel_changes(report, monkeypatch, tmp_path):
    page = report.document("tables", report.sources())
    assert report.is_known(page) and not report.is_known(report.document("tables", "with problems"))
    kernel = tmp_path / "kernels" / "megatsp_kernels" / "new" / "triton.py"
    kernel.parent.mkdir(parents=True)
    kernel.write_text("another kernel")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "__file__", str(tmp_path / "scripts" / "aot_report.py"))
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "aot_report.py").write_text("the gate")
    assert not report.is_known(page)
    before = report.sources()
    kernel.write_text("another kernel, changed")
    assert report.sources() != before


def test_a_sample_has_every_operation_on_every_chip(report):
    jobs = list(report.list_jobs([], report.TARGETS))
    chosen = report.sample(jobs)
    assert {(job.op, job.target) for job in chosen} == {(job.op, job.target) for job in jobs}
    assert len(jobs) / report.SAMPLE < len(chosen) < len(jobs) / 5


def test_a_compiler_that_dies_costs_its_kernel_alone(report, monkeypatch):
    monkeypatch.setattr(report, "compile_job", dying_job)
    jobs = list(report.list_jobs(["swiglu"], ["sm_90"]))[:3]
    rows = report.compile_all(jobs)
    assert [row.job for row in rows] == jobs
    assert [row.problems for row in rows] == [["does not compile: the compiler died"], [], []]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "swish"], "no operation swish: there are "),
        (["--target", "gfx90a"], "invalid choice: 'gfx90a'"),
    ],
)
def test_what_it_does_not_know_is_refused(report, capsys, arguments, message):
    assert report.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_it_refuses_to_interpret(report, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert report.main(["--check"]) == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err
