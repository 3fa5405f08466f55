"""scripts/bench/kernels.py: predicted and measured tables, pages, plots, and what it refuses."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import LIMIT_S

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(
    "TRITON_INTERPRET" not in os.environ, reason="tries the program without a GPU"
)


def kernels(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "bench" / "kernels.py"), *arguments],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )


def test_a_smoke_run_measures_shows_and_writes(tmp_path):
    files = {name: tmp_path / name for name in ("found.json", "page.md", "plot.png")}
    flags = zip(("--json", "--markdown", "--plot"), map(str, files.values()), strict=True)
    found = kernels("--op", "swiglu", "--smoke", *(word for pair in flags for word in pair))
    assert found.returncode == 0, found.stderr
    report = json.loads(files["found.json"].read_text())
    forward, backward = report["results"]
    assert (forward["name"], backward["name"]) == ("swiglu/forward", "swiglu/backward")
    assert forward["bytes"] == 3 * 7 * 40 * 2 and forward["flops"] == 0
    assert {name: len(times) for name, times in forward["times_ms"].items()} == {"megatsp": 1, "torch": 1}
    assert forward["failures"] == {"torch.compile": "not compiled for a CPU"}
    assert forward["floors"]["MI300X"]["bound"] == "memory"
    assert report["machine"]["commit"] and report["machine"]["triton"]
    page = files["page.md"].read_text()
    assert (
        "| swiglu/forward  | rows 7 columns 40 | torch.compile |" in page and "not compiled for a CPU" in page
    )
    assert "interpreted: these times mean nothing" in page
    assert files["plot.png"].read_bytes().startswith(b"\x89PNG")


def test_without_a_gpu_it_predicts_and_says_so(tmp_path):
    found = kernels("--op", "swiglu", "--markdown", str(tmp_path / "page.md"))
    assert found.returncode == 0, found.stderr
    assert "Nothing was measured: there is no GPU here." in found.stdout
    page = (tmp_path / "page.md").read_text()
    assert "**predicted; nothing was measured**" in page
    # 3 x 16,384 x 2,048 bf16 elements at 4.3 TB/s.
    assert "201.3" in page and "46.8" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "swish"], "no operation swish: there are "),
        (["--tune"], "--tune measures, which needs a GPU"),
        (["--op", "swiglu", "--markdown"], "--markdown without FILE writes kernels.md"),
        (["--repetitions", "0"], "--repetitions 0: at least 1"),
        (["--tune", "--roofline"], "not allowed with"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, message):
    found = kernels(*arguments)
    assert found.returncode == 2
    assert message in found.stderr


def test_ours_failing_sets_the_exit_code():
    """Where Triton does not interpret, ours cannot run on a CPU; the rivals can."""
    found = kernels("--op", "swiglu", "--smoke", TRITON_INTERPRET="0")
    assert found.returncode == 1
    assert "kernels: swiglu/forward: " in found.stderr and "'megatsp': 'ValueError: " in found.stderr
    assert "| swiglu/forward  | rows 7 columns 40 |         torch |" in found.stdout


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch.compile's own, when imported
def test_tuning_ranks_the_configs(monkeypatch, capsys):
    """Two configs in the interpreter's table: both are measured, and the default is named."""
    from megatsp_kernels.common import Config
    from megatsp_kernels.swiglu.triton import TABLE

    # By its path: the checkout's folder `kernels` would pass for a module of that name.
    spec = importlib.util.spec_from_file_location("bench_kernels", ROOT / "scripts" / "bench" / "kernels.py")
    assert spec and spec.loader
    found = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_kernels", found)  # dataclasses look their module up
    spec.loader.exec_module(found)
    first = TABLE["interpreter"][0]
    monkeypatch.setitem(TABLE, "interpreter", [first, Config(dict(ROWS=8, COLUMNS=32))])
    assert found.main(["--op", "swiglu", "--smoke", "--tune"]) == 0
    text = capsys.readouterr().out
    rows = [line for line in text.splitlines() if line.startswith("| swiglu/forward TABLE")]
    assert len(rows) == 2
    assert sum("ROWS 4 COLUMNS 16" in row and "default" in row for row in rows) == 1
    assert [sum(word in row for row in rows) for word in ("fastest", "ROWS 8 COLUMNS 32")] == [1, 1]
