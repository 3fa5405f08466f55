"""Which operations there are to compile and to measure: one name a folder."""

import importlib
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

from megatsp_kernels.aot import Variant
from megatsp_kernels.benchmark import Benchmark

# Each is a folder with `variants` in triton.py and `benchmarks` in bench.py.
OPS: tuple[str, ...] = ("attention", "linear_cross_entropy", "rms_norm", "rotary", "streamed", "swiglu")


def variants(target: str, ops: Sequence[str] = ()) -> Iterator[tuple[str, Variant]]:
    """Each operation's name with everything that it compiles for a chip; ops: those alone.

    Raises:
        ValueError: an operation that is not listed.
        ImportError: one that is listed has no triton.py, or no `variants` in it.
    """
    for op in _chosen(ops):
        for variant in _function(op, "triton", "variants")(target):
            yield op, variant


def benchmarks(smoke: bool = False, ops: Sequence[str] = ()) -> Iterator[tuple[str, Benchmark]]:
    """Each operation's name with everything that it measures; smoke: at sizes for the interpreter.

    Raises: as `variants`, of bench.py.
    """
    for op in _chosen(ops):
        for benchmark in _function(op, "bench", "benchmarks")(smoke):
            yield op, benchmark


def load(op: str, file: str) -> ModuleType:
    """The module of one of an operation's files, "triton" or "bench".

    Raises:
        ImportError: the file is not there, or cannot be imported.
    """
    return importlib.import_module(f"megatsp_kernels.{op}.{file}")


def _function(op: str, file: str, name: str) -> Callable[..., Any]:
    module = load(op, file)
    if not hasattr(module, name):
        raise ImportError(f"megatsp_kernels/{op}/{file}.py, listed in registry.OPS, has no `{name}`")
    return getattr(module, name)


def _chosen(ops: Sequence[str]) -> Sequence[str]:
    if unknown := [op for op in ops if op not in OPS]:
        raise ValueError(f"no operation {', '.join(unknown)}: there are {', '.join(OPS)}")
    return ops or OPS
