"""shellcheck finds nothing in any shell script of the repository, and hadolint nothing in the Dockerfile."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOLS = Path(sys.executable).parent  # pip puts both beside python: versions as pyproject.toml pins them
SHEBANG = re.compile(rb"#!.*\b(ba)?sh\b")


def tracked() -> list[Path]:
    """Every file that git knows or would add."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def is_shell(path: Path) -> bool:
    """By its suffix, or by its first line."""
    with path.open("rb") as file:
        return path.suffix in (".sh", ".sbatch") or bool(SHEBANG.match(file.readline(100)))


def lint(*command: str | Path) -> None:
    result = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert result.returncode == 0, result.stdout


def test_shell_scripts() -> None:
    # Heads of job scripts are checked with their body: tests/jobs/test_script.py.
    scripts = [path for path in tracked() if is_shell(path) and path.parent.name != "golden"]
    assert {ROOT / ".ci/run", ROOT / "scripts/setup.sh", ROOT / "launch/container/install.sh"} <= set(scripts)
    lint(TOOLS / "shellcheck", *scripts)


def test_dockerfile() -> None:
    lint(TOOLS / "hadolint", "--failure-threshold", "style", "Dockerfile")


def test_they_find_faults(tmp_path: Path) -> None:
    """So that a tool which checks nothing, or a configuration that turns all off, is seen."""
    (tmp_path / "bad.sh").write_text("#!/bin/bash\nrm -r $1\n")
    with pytest.raises(AssertionError, match="SC2086"):
        lint(TOOLS / "shellcheck", tmp_path / "bad.sh")
    (tmp_path / "Dockerfile").write_text("FROM debian\n")
    with pytest.raises(AssertionError, match="DL3006"):
        lint(TOOLS / "hadolint", "--failure-threshold", "style", tmp_path / "Dockerfile")
