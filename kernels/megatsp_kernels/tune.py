"""Every config of an operation's tables as a contestant of its benchmarks."""

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatsp_kernels.aot import TARGETS
from megatsp_kernels.benchmark import Benchmark
from megatsp_kernels.common import INTERPRETER, Config, Table

OURS = "megatsp"


@dataclass(frozen=True)
class NamedTable:
    """A table and where it stands: "TABLE", "TABLES[64]"."""

    name: str
    table: Table


def tables(op: str) -> list[NamedTable]:
    """The tables in the operation's triton*.py: at module level, or in its dicts and lists."""
    package = importlib.import_module(f"megatsp_kernels.{op}")
    found: dict[int, NamedTable] = {}
    for module in pkgutil.iter_modules(package.__path__):
        if module.name.startswith("triton"):
            for name, value in vars(importlib.import_module(f"{package.__name__}.{module.name}")).items():
                for table in _inside(name, value):
                    found.setdefault(id(table.table), table)
    return [*found.values()]


def contest(benchmark: Benchmark, table: NamedTable, target: str) -> Benchmark | None:
    """The benchmark with ours under each of the table's configs for a chip; None where there is no choice.

    The other tables keep their defaults. The contestants' names are the configs'.
    """
    entry = target if target in table.table else "gfx942" if target.startswith("gfx") else "sm_90"
    configs = table.table[entry]
    if len(configs) < 2:
        return None

    def make(device: torch.device) -> Mapping[str, Callable[[], Any] | str]:
        ours = benchmark.make(device)[OURS]
        if isinstance(ours, str):
            return {OURS: ours}

        def under(config: Config) -> Callable[[], Any]:
            def call() -> Any:
                with _first(table, entry, config):
                    return ours()

            return call

        return {describe(config): under(config) for config in configs}

    return replace(benchmark, name=f"{benchmark.name} {table.name}", make=make)


def describe(config: Config) -> str:
    """A config on a line: "ROWS 4 COLUMNS 512, 4 warps, 2 stages"."""
    sizes = " ".join(f"{name} {value}" for name, value in config.blocks.items())
    amd = [f"{name} {value}" for name, value in config.amd.items()]
    return ", ".join([sizes, f"{config.num_warps} warps", f"{config.num_stages} stages", *amd])


@contextmanager
def _first(named: NamedTable, entry: str, config: Config) -> Iterator[None]:
    """Inside, `config` is the one that `choose` takes."""
    table = named.table
    assert isinstance(table, MutableMapping), f"{named.name} must be a dict"
    configs = table[entry]
    table[entry] = [config, *configs]
    try:
        yield
    finally:
        table[entry] = configs


def _inside(name: str, value: Any) -> Iterator[NamedTable]:
    if isinstance(value, Mapping):
        if _is_table(value):
            yield NamedTable(name, value)
        else:
            for key, inner in value.items():
                yield from _inside(f"{name}[{key!r}]", inner)
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            yield from _inside(f"{name}[{index}]", inner)


def _is_table(value: Mapping[Any, Any]) -> bool:
    return any(target in value for target in (*TARGETS, INTERPRETER)) and all(
        isinstance(configs, Sequence) and all(isinstance(config, Config) for config in configs)
        for configs in value.values()
    )
