"""scripts/bench/data.py: that it measures, writes and goes on; no time is asserted."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import LIMIT_S

ROOT = Path(__file__).resolve().parents[1]


def data(*arguments: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "bench" / "data.py"), *arguments],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )


def test_a_page_with_a_plot(tmp_path):
    files = "--output", str(tmp_path / "page.md"), "--plot", str(tmp_path / "plot.png")
    found = data("all", "--only", "loader", "open", "index", "--smoke", "--folder", str(tmp_path), *files)
    assert found.returncode == 0, found.stderr
    sections = json.loads((tmp_path / "results" / "page.json").read_text())["sections"]
    assert sections.keys() == {"loader", "open", "index"}
    rates = {(r["packing"], r["share"], r["workers"]): r["rates"] for r in sections["loader"]["results"]}
    assert rates.keys() == {(p, s, w) for p in ("concat", "best_fit") for s in (1, 8) for w in (0, 1)}
    assert all(rate > 0 for found in rates.values() for rate in found)
    built, cached = sections["open"]["results"]
    assert (built["state"], cached["state"]) == ("built", "cached")
    assert built["handles_read"] <= 3 and cached["handles_read"] <= 3  # of 10 files, mapped
    assert sections["index"]["results"][0]["documents"] == 1000
    page = (tmp_path / "page.md").read_text()
    assert "## Reading" in page and "## Building an index" in page and "megatron-core" in page
    assert "| greedy  |     1,000 |" in page
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("megatsp-bench-*"))


@pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed")
def test_megatrons_loop_makes_the_same_files_and_a_page_grows(tmp_path):
    (tmp_path / "results").mkdir()
    before = {
        "machine": {"cpu": "another"},
        "results": [{"model": "m", "rates": [3.0], "wait_ms": [1.0], "step_ms": [2.0]}],
    }
    document = {"format": "megatsp-data-1", "sections": {"training": before}}
    (tmp_path / "results" / "page.json").write_text(json.dumps(document))
    found = data("preprocess", "--smoke", "--folder", str(tmp_path), "--output", str(tmp_path / "page.md"))
    assert found.returncode == 0, found.stderr
    sections = json.loads((tmp_path / "results" / "page.json").read_text())["sections"]
    (whole,) = sections["whole"]["results"]
    assert whole["runs"][0]["worker_peak_bytes"] > 10**7 and whole["cpu_rates"][0] > 0
    ours, theirs = sections["contest"]["results"]
    assert (ours["system"], theirs["system"]) == ("megatsp", "Megatron")
    assert ours["sha256"] == theirs["sha256"]
    assert "tools/preprocess_data.py" in found.stdout and "cpu another" not in found.stdout
    page = (tmp_path / "page.md").read_text()
    assert sections["training"] == before and "Measured: cpu another." in page and "same files" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["everything"], "invalid choice: 'everything'"),
        (["open", "--files", "15"], "--files 15: a multiple of 10"),
        (["open", "--only", "loader"], "--only loader is no section of open"),
        (["loader", "--workers", "0"], "--repeats and --workers: at least 1"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, message, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "bench"))
    spec = importlib.util.spec_from_file_location("bench_data", ROOT / "scripts" / "bench" / "data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main(arguments) == 2
    assert message in capsys.readouterr().err
