"""The built wheel holds the two packages and the configurations, and trains from any folder."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "megatsp",
    "kernels",
    "launch",
    "configs",
    "data",
    "tests",
]


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Output of python -m command, run in cwd."""
    result = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=cwd,
        env=os.environ | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools would take modules deleted since from a checkout's build/."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, source)
    run("build", "--wheel", "--no-isolation", "--outdir", folder, source, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


def test_wheel_holds_what_it_should(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(n for n in names if n.endswith(".dist-info/METADATA"))).decode()

    assert {n.split("/")[0] for n in names if ".dist-info/" not in n} == {"megatsp", "megatsp_kernels"}
    for package in ("megatsp", "kernels/megatsp_kernels"):
        folder = ROOT / package
        modules = {str(m.relative_to(folder.parent)) for m in folder.rglob("*.py")}
        assert modules <= names, f"no __init__.py beside {modules - names}?"
    assert {
        f"megatsp/configs/{c.relative_to(ROOT / 'configs')}" for c in ROOT.glob("configs/**/*.yaml")
    } <= names
    assert {f"megatsp/profiles/{p.name}" for p in ROOT.glob("launch/profiles/*.yaml")} <= names
    assert "apex @ git+https://github.com/NVIDIA/apex" in metadata  # never PyPI's unrelated apex


def test_wheel_trains_in_any_folder(wheel: Path, tmp_path: Path) -> None:
    site, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    run("pip", "install", "--quiet", "--no-deps", "--target", site, wheel, cwd=work)
    with (site / "megatsp/configs/train.yaml").open("a") as config:
        config.write("name: from_the_wheel\n")  # a mark that only this copy bears

    output = run("megatsp", "train", "--dry-run", cwd=work, PYTHONPATH=str(site))

    assert "from_the_wheel" in output
    assert not list(work.iterdir()), "a dry run writes nothing"
