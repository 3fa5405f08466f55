"""What a benchmark compares and over what: specs of schemes, swept keys, and the configurations they make."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatsp.compose import compose, group_choices, key_paths
from megatsp.nearest import did_you_mean
from megatsp.schema import Config
from megatsp.validate import validate

DEFAULT_SCHEMES = ("tsp", "fsdp_cp", "tp", "cp", "cp_ring", "cp_ulysses", "tp_cp")
# What a scheme may set beside parallel's keys: the work stays the same.
FREE = ("trainer.recompute_granularity", "trainer.dtype", "trainer.micro_batch_size")
TSP_PRESETS = ("tsp", "owner")


@dataclass(frozen=True)
class Scheme:
    """One way to run the model. label: the spec; overrides: on top of the user's and the sweep's."""

    label: str
    name: str  # of a preset, or of a reference implementation
    overrides: tuple[str, ...] = ()
    is_reference: bool = False


@dataclass(frozen=True)
class Sweep:
    """One key, or group, and its values."""

    key: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Case:
    """One row of the result: a scheme at a point of the sweep on a number of ranks.

    point: the swept keys' values. config: composed, and validated unless `refused` says why not.
    composed: before validation, with what it chooses still to be chosen.
    """

    point: dict[str, str]
    world_size: int
    scheme: Scheme
    config: Config
    composed: Config
    refused: str = ""


def parse_schemes(
    specs: Sequence[str], references: Iterable[str] = (), user_dir: Path | None = None
) -> list[Scheme]:
    """The schemes of specs such as `tp_cp:tp=4` and `tsp:mlp_buckets=8,trainer.dtype=bf16`.

    A key without a dot is one of `parallel`.

    Args:
        references: names of single-process implementations, which are no presets.

    Raises:
        ValueError: unknown name or key, a key without a value, the same spec twice.
    """
    schemes = [_parse_scheme(spec, list(references), user_dir) for spec in specs]
    for spec in specs:
        if specs.count(spec) > 1:
            raise ValueError(f"--schemes: {spec} is given twice")
    return schemes


def _parse_scheme(spec: str, references: list[str], user_dir: Path | None) -> Scheme:
    name, colon, rest = spec.partition(":")
    valid = [*group_choices(user_dir)["parallel"], *references]
    if name not in valid:
        near = did_you_mean(name, valid)
        raise ValueError(f"--schemes {spec}: unknown scheme {name!r}{near} (schemes: {', '.join(valid)})")
    overrides = []
    for item in rest.split(",") if colon else ():
        key, _, value = item.partition("=")
        key = key if "." in key else f"parallel.{key}"
        if not value:
            raise ValueError(f"--schemes {spec}: {item!r} is no key=value; write {name}:key=value,key=value")
        if key not in _keys():
            raise ValueError(f"--schemes {spec}: unknown key {key}{did_you_mean(key, _keys())}")
        if not key.startswith("parallel.") and key not in FREE:
            free = ", ".join(FREE)
            raise ValueError(
                f"--schemes {spec}: {key} is the same for all schemes, which do the same work; a scheme may "
                f"set keys of parallel and {free}. Give {key}=... to all, or --sweep it"
            )
        overrides.append(f"{key}={value}")
    return Scheme(spec, name, tuple(overrides), name in references)


def baseline(schemes: Sequence[Scheme]) -> Scheme:
    """What the others are compared with: the first TSP scheme, or the first of all."""
    return next((scheme for scheme in schemes if scheme.name in TSP_PRESETS), schemes[0])


def parse_sweep(text: str) -> Sweep:
    """KEY=V1,V2: a key, the last component of one if no other ends so, or a group and its choices.

    Raises:
        ValueError: not of this form, an unknown or ambiguous key, the same value twice.
    """
    name, _, rest = text.partition("=")
    values = tuple(value.strip() for value in rest.split(",")) if rest else ()
    if not name or not all(values) or not values:
        raise ValueError(f"--sweep {text}: write KEY=V1,V2, as in seq_length=1024,4096")
    if len({*values}) < len(values):
        raise ValueError(f"--sweep {text}: a value is given twice")
    if name in group_choices() and name != "parallel":
        return Sweep(name, values)
    keys = [key for key in _keys() if key == name or key.endswith(f".{name}")]
    if name in keys:
        keys = [name]
    if len(keys) > 1:
        raise ValueError(f"--sweep {text}: {name} could be {' or '.join(keys)}; give the whole key")
    if not keys:
        # A bare name is also held against last components: seq_lenght is nearer to seq_length.
        valid = _keys() if "." in name else [key.rpartition(".")[2] for key in _keys()]
        raise ValueError(f"--sweep {text}: unknown key {name}{did_you_mean(name, dict.fromkeys(valid))}")
    return Sweep(keys[0], values)


def make_cases(
    overrides: list[str],
    schemes: Sequence[Scheme],
    sweeps: Sequence[Sweep],
    worlds: Sequence[int],
    user_dir: Path | None = None,
) -> list[Case]:
    """Every scheme at every point on every world, in the order of the table.

    The user's overrides come first, then the point, then the scheme's own. What one scheme cannot
    run is said in its case.

    Args:
        worlds: numbers of ranks; empty is launch.nproc alone.

    Raises:
        ValueError: an override, a swept value or a scheme's value that is no configuration at all.
    """
    for override in overrides:
        if override.startswith("parallel="):
            raise ValueError(f"{override}: a benchmark's schemes choose the preset; use --schemes")
    keys = [sweep.key for sweep in sweeps]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"--sweep: {key} is swept twice; give all its values at once")
    points = [
        dict(zip(keys, values, strict=True)) for values in itertools.product(*(s.values for s in sweeps))
    ]
    cases = []
    for point in points:
        swept = [f"{key}={value}" for key, value in point.items()]
        composed = []
        for scheme in schemes:
            preset = [] if scheme.is_reference else [f"parallel={scheme.name}"]
            composed.append(compose([*overrides, *swept, *preset, *scheme.overrides], user_dir))
        for world_size in worlds or [composed[0].launch.nproc]:
            cases += [
                _case(point, world_size, scheme, config)
                for scheme, config in zip(schemes, composed, strict=True)
            ]
    return cases


def _case(point: dict[str, str], world_size: int, scheme: Scheme, config: Config) -> Case:
    if scheme.is_reference and world_size > 1:
        return Case(point, world_size, scheme, config, config, "one process: only with --world 1")
    try:
        return Case(point, world_size, scheme, validate(config, world_size), config)
    except ValueError as error:
        return Case(point, world_size, scheme, config, config, str(error))


def _keys() -> list[str]:
    """Every key that takes a value: no groups of keys."""
    paths = key_paths()
    groups = {path.rpartition(".")[0] for path in paths}
    return [path for path in paths if path not in groups]
