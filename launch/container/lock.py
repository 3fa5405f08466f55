"""Pins what requirements.txt depends on, directly or not, from the environment that runs this.

    .venv/bin/python launch/container/lock.py    write constraints.txt; the tests ought to pass there

Left out are the base image's packages (keep_base.py) and those that requirements.txt pins itself.
"""

import importlib.metadata
import sys
from pathlib import Path

from keep_base import BASE
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HERE = Path(__file__).parent
IMAGE = {"python_version": "3.12", "python_full_version": "3.12.0"}  # the rest is as here: Linux, CPython
HEAD = """\
# What the packages of requirements.txt depend on, pinned, but for what the base image brings. Made by lock.py
# from an environment in which the tests pass: after a change of requirements.txt make it anew.
"""


def requirements() -> list[Requirement]:
    """The lines of requirements.txt."""
    lines = (HERE / "requirements.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def closure(roots: list[Requirement]) -> dict[str, str]:
    """Installed version, by normalised name, of these and of all that they need on the image's Python.

    Raises:
        importlib.metadata.PackageNotFoundError: one is not installed.
    """
    found = {}
    seen = set()
    waiting = [(canonicalize_name(root.name), extra) for root in roots for extra in ("", *root.extras)]
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen or BASE.fullmatch(name):
            continue
        seen.add((name, extra))
        found[name] = importlib.metadata.version(name)
        environment = {**default_environment(), **IMAGE, "extra": extra}
        for requirement in map(Requirement, importlib.metadata.requires(name) or []):
            if not requirement.marker or requirement.marker.evaluate(environment):
                waiting += [(canonicalize_name(requirement.name), e) for e in ("", *requirement.extras)]
    return found


def main() -> None:
    """Writes constraints.txt.

    Raises:
        SystemExit: requirements.txt pins another version than is installed, with other dependencies.
    """
    direct = {canonicalize_name(r.name): str(r.specifier) for r in requirements()}
    found = closure(requirements())
    differ = [f"{name}{pin}, here {found[name]}" for name, pin in direct.items() if pin != f"=={found[name]}"]
    if differ:
        sys.exit(
            f"lock: requirements.txt is of another environment: {'; '.join(differ)}. Change it or install it"
        )
    lines = [f"{name}=={version}\n" for name, version in sorted(found.items()) if name not in direct]
    (HERE / "constraints.txt").write_text(HEAD + "".join(lines))


if __name__ == "__main__":
    main()
