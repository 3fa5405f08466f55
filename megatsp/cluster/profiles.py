"""Cluster profiles: the environment variables and expected speeds of a kind of cluster, with their reasons.

A profile is a YAML file of launch/profiles, or one of the user's own. What the user has set wins.
"""

import math
import re
from collections.abc import Mapping, MutableMapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from megatsp.nearest import did_you_mean

NONE = "none"  # the profile that sets nothing

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# In the name of what holds a secret.
SECRET = re.compile(r"SECRET|PASSW|CREDENTIAL|(KEY|TOKEN)S?\d*(_|$)|AUTH(_|$)", re.IGNORECASE)
_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Variable:
    """An environment variable, and why it has this value."""

    name: str
    value: str
    why: str


@dataclass(frozen=True)
class Expected:
    """What such a cluster reaches when nothing is wrong with it; 0: not known.

    gemm_tflops: of a large bf16 product on one GPU. within_node_gb_s: what a GPU receives of its node's
    others in a large all-gather; between_nodes_gb_s: what it receives through its own network adapter.
    ranks_per_node: GPUs of a node. source: where the figures are from.
    """

    gemm_tflops: float = 0.0
    within_node_gb_s: float = 0.0
    between_nodes_gb_s: float = 0.0
    ranks_per_node: int = 0
    source: str = ""


@dataclass(frozen=True)
class Profile:
    name: str
    about: str
    variables: tuple[Variable, ...] = ()
    expected: Expected = field(default_factory=Expected)


def profiles_dir() -> Path:
    """The folder of the shipped profiles: inside the package (a wheel), or beside it (a checkout)."""
    package = Path(__file__).resolve().parents[1]
    folders = (package / "profiles", package.parent / "launch" / "profiles")
    return next(folder for folder in folders if (folder / "cpu.yaml").is_file())


def profile_names() -> list[str]:
    """What launch.profile takes, beside paths."""
    return [NONE, *sorted(file.stem for file in profiles_dir().glob("*.yaml"))]


def is_path(name: str) -> bool:
    """Whether launch.profile names a file of the user's own."""
    return "/" in name or name.endswith(".yaml")


def load_profile(name: str) -> Profile:
    """The profile of this name, or in the file at this path: with a / in it, or .yaml at its end.

    Raises:
        ValueError: no such profile or file, or the file has what no profile has.
    """
    if name == NONE:
        return Profile(NONE, "sets nothing")
    if is_path(name):
        return _read(name, Path(name))
    if name not in (names := profile_names()):
        near = did_you_mean(name, names)
        raise ValueError(f"unknown profile {name}{near} (profiles: {', '.join(names)}, or a path to a .yaml)")
    return _read(name, profiles_dir() / f"{name}.yaml")


def apply(profile: Profile, environ: MutableMapping[str, str]) -> list[str]:
    """Sets what `environ` does not have yet; a user's own value wins, also an empty one.

    Returns a line for each variable: what is effective, and whose it is. Whoever gets an environment to which
    the profile has been applied says the same of it.
    """
    lines = []
    for variable in profile.variables:
        value = environ.setdefault(variable.name, variable.value)
        whose = f"profile {profile.name}"
        if value != variable.value:
            whose = f"your own; profile {profile.name} has {variable.value}"
        lines.append(f"{variable.name}={value} ({whose})")
    return lines


def export_lines(profile: Profile) -> list[str]:
    """The same for bash: a line for each variable, which leaves alone what is set already."""
    return [f'export {v.name}="${{{v.name}-{_quoted(v.value)}}}"  # {v.why}' for v in profile.variables]


def _quoted(value: str) -> str:
    """A value as the default of an expansion in double quotes, which end for a single quote."""
    return re.sub(r'([\\"$`}])', r"\\\1", value).replace("'", '"\\\'"')


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping, of which YAML takes the last one silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := [key for i, key in enumerate(keys) if key in keys[:i]]:
            raise yaml.YAMLError(f"{twice[0]} stands there twice (line {node.start_mark.line + 1} on)")
        return super().construct_mapping(node, deep)


def _read(name: str, file: Path) -> Profile:
    try:
        values = yaml.load(file.read_text(), _Loader)
    except FileNotFoundError:
        raise ValueError(f"no profile {file}; shipped ones: {', '.join(profile_names())}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"profile {file} cannot be read: {error}") from None
    wrong = f"profile {file}"
    _check_keys(wrong, "", values, ("about", "variables", "expected"), ("about",))
    variables = values.get("variables", {})
    if not isinstance(variables, Mapping):
        raise ValueError(f"{wrong}: variables: expected a mapping of names, each with value and why")
    about = _text(wrong, "about", values["about"])
    read = tuple(_variable(wrong, key, given) for key, given in variables.items())
    return Profile(name, about, read, _expected(wrong, values.get("expected", {})))


def _variable(wrong: str, name: Any, given: Any) -> Variable:
    path = f"variables.{name}"
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"{wrong}: {path}: a variable's name has letters, digits and _")
    if SECRET.search(name):
        raise ValueError(
            f"{wrong}: {path} looks like a secret, and profiles end up in job scripts and logs; set it in "
            "the shell that submits"
        )
    if name in _LAUNCHERS:
        raise ValueError(f"{wrong}: {path} is set for each rank by what starts it; leave it out")
    _check_keys(wrong, f"{path}.", given, ("value", "why"), ("value", "why"))
    if not isinstance(given["value"], str):
        raise ValueError(f"{wrong}: {path}.value: expected text; quote it: '{given['value']}'")
    if not given["value"].isprintable():
        raise ValueError(f"{wrong}: {path}.value: expected one line of printable characters")
    return Variable(name, given["value"], _text(wrong, f"{path}.why", given["why"]))


def _expected(wrong: str, given: Any) -> Expected:
    known = {item.name: item for item in fields(Expected)}
    _check_keys(wrong, "expected.", given, tuple(known), ())
    values: dict[str, Any] = {}
    for name, value in given.items():
        default = known[name].default
        assert default is not MISSING
        if isinstance(default, str):
            values[name] = _text(wrong, f"expected.{name}", value)
            continue
        kinds, spoken = ((int,), "a whole number") if isinstance(default, int) else ((int, float), "a number")
        if type(value) not in kinds or not 0 <= value < math.inf:
            raise ValueError(f"{wrong}: expected.{name}={value}: expected {spoken} >= 0; 0: not known")
        values[name] = type(default)(value)
    if given and not values.get("source"):
        raise ValueError(f"{wrong}: expected.source is missing: say where the figures are from")
    return Expected(**values)


def _check_keys(wrong: str, path: str, given: Any, allowed: tuple[str, ...], needed: tuple[str, ...]) -> None:
    """`given` is a mapping with no other keys, and with those that are needed."""
    if not isinstance(given, Mapping):
        where = f"{path.rstrip('.')}: " if path else ""
        raise ValueError(f"{wrong}: {where}expected a mapping with {', '.join(allowed)}")
    for key in given:
        if key not in allowed:
            near = did_you_mean(str(key), allowed)
            raise ValueError(f"{wrong}: unknown key {path}{key}{near} (allowed: {', '.join(allowed)})")
    for key in needed:
        if key not in given:
            raise ValueError(f"{wrong}: {path}{key} is missing")


def _text(wrong: str, path: str, given: Any) -> str:
    """A text in one line, with single spaces."""
    if not isinstance(given, str) or not given.strip():
        raise ValueError(f"{wrong}: {path}: expected text")
    text = " ".join(given.split())
    if not text.isprintable():
        raise ValueError(f"{wrong}: {path}: expected printable text")
    return text
