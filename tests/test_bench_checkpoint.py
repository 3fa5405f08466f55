"""scripts/bench/checkpoint.py: that it measures and writes; no time is asserted."""

import os
import subprocess
import sys
from pathlib import Path

from waiting import LIMIT_S

ROOT = Path(__file__).resolve().parents[1]


def test_a_page_with_a_plot(tmp_path):
    page = tmp_path / "page.md"
    found = subprocess.run(
        [
            sys.executable, str(ROOT / "scripts" / "bench" / "checkpoint.py"), "--smoke",
            "--folder", str(tmp_path), "--output", str(page),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    rows = [line for line in page.read_text().splitlines() if line.startswith("| ")]
    assert len(rows) == 2 * 2 + 5 + 3
    assert all(row.count("|") == 6 for row in rows)
    assert page.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("megatsp-bench-")] == []
