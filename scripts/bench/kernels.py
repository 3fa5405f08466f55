"""Every kernel beside its rivals and beside the least time that its shapes need.

    python scripts/bench/kernels.py                     # on a GPU: measured; elsewhere: predicted alone
    python scripts/bench/kernels.py --op swiglu --tune  # every config of the chip's table
    python scripts/bench/kernels.py --markdown          # writes docs/benchmarks/kernels.md

With --smoke: tiny shapes, which without a GPU need TRITON_INTERPRET=1.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from megatsp_kernels import registry
from megatsp_kernels.benchmark import Benchmark
from megatsp_kernels.common import target_of
from megatsp_kernels.measure import DeviceLostError, Measured, measure
from megatsp_kernels.roofline import MACHINES, Floor, Machine, floor, intensity, machine_named
from megatsp_kernels.tune import OURS, contest, tables

from megatsp.bench.machine import describe_machine
from megatsp.bench.table import align
from megatsp.parser import Parser

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAGE = Path(__file__).resolve().parents[2] / "docs" / "benchmarks" / "kernels.md"
FORMAT = "megatsp-kernels-1"
LEGEND = """\
FLOPs and bytes are counted from the shapes: each tensor read or written once. least: microseconds at the
vendor's peak for bf16 products, or at the bandwidth of a copy; reachable: at what torch's own products reach
instead of that peak.
"""
MEASURED_LEGEND = """\
us: median of interleaved repetitions with cold caches, between two events. vs megatsp: its time over ours.
of least, of reachable: the predicted time over this one.
"""


@dataclass
class Result:
    """A benchmark, what is predicted of it by machine, and what was measured. chosen: the configs' table."""

    op: str
    name: str
    shape: dict[str, int]
    dtype: str
    flops: int
    bytes: int
    intensity: float
    floors: dict[str, Floor]
    times_ms: dict[str, list[float]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


def main(arguments: list[str]) -> int:
    """Returns 1 if ours failed somewhere, 2 if the arguments make no sense; a rival's failure is shown."""
    try:
        given = _parse(arguments)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if given.smoke and device.type == "cpu" and "TRITON_INTERPRET" not in os.environ:
            raise ValueError("--smoke without a GPU runs in Triton's interpreter: set TRITON_INTERPRET=1")
        if given.tune and device.type == "cpu" and not given.smoke:
            raise ValueError("--tune measures, which needs a GPU (or --smoke, to try the program)")
        wanted = [*registry.benchmarks(given.smoke, given.op)]
    except ValueError as error:
        print(f"kernels: {error}", file=sys.stderr)
        return 2
    measured = device.type == "cuda" or given.smoke
    results: list[Result] = []
    machine = {**_describe(), "measured": "yes" if measured else "no"}
    try:
        for result in run(wanted, device, given.repetitions, given.tune, measured):
            results.append(result)
            _save(given, machine, results)  # what is there if a later one hangs
    except DeviceLostError as error:
        print(
            f"kernels: the GPU cannot be used any more after {error}; the rest was not run", file=sys.stderr
        )
        return 1
    print(_text(given, machine, results))
    if given.plot:
        plot(results, given.plot)
    lost = [result for result in results if {OURS, "inputs"} & {*result.failures}]
    for result in lost:
        print(f"kernels: {result.name}: {result.failures}", file=sys.stderr)
    return 1 if lost else 0


def _text(given: Any, machine: dict[str, str], results: Sequence[Result]) -> str:
    return _tuned(results) if given.tune else render(results, machine)


def _save(given: Any, machine: dict[str, str], results: Sequence[Result]) -> None:
    if given.json:
        given.json.write_text(_to_json(machine, results))
    if given.markdown:
        given.markdown.write_text(page(_text(given, machine, results), machine))


def _parse(arguments: list[str]) -> Any:
    parser = Parser("kernels.py", "Measures the kernels, or predicts the least that they take.")
    add = parser.add_argument
    add("--op", nargs="+", default=[], metavar="NAME", help=f"of {', '.join(registry.OPS)} (default: all)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--roofline", action="store_true", help="times beside the least that shapes need (default)"
    )
    what.add_argument(
        "--tune", action="store_true", help="measure ours with every config of the chip's table"
    )
    add("--smoke", action="store_true", help="tiny shapes, one repetition; interpreted without a GPU")
    add("--repetitions", type=int, metavar="N", help="times that each is measured (default: 20)")
    add("--json", type=Path, metavar="FILE", help="write everything after every benchmark")
    add(
        "--markdown",
        type=Path,
        nargs="?",
        const=PAGE,
        metavar="FILE",
        help=f"write a page (default: {PAGE.name})",
    )
    add("--plot", type=Path, metavar="FILE.png", help="intensity and time of every benchmark")
    given = parser.parse_args(arguments)
    if given.repetitions is not None and given.repetitions < 1:
        raise ValueError(f"--repetitions {given.repetitions}: at least 1")
    if given.markdown == PAGE and (given.op or given.smoke or given.tune):
        raise ValueError(
            f"--markdown without FILE writes {PAGE.name}, which shows all operations: name a FILE"
        )
    if given.tune and given.plot:
        raise ValueError("--plot goes with --roofline: --tune compares configs, not kernels")
    given.repetitions = given.repetitions or (1 if given.smoke else 20)
    return given


def run(
    wanted: Sequence[tuple[str, Benchmark]],
    device: torch.device,
    repetitions: int,
    tune: bool,
    measured: bool,
) -> Iterator[Result]:
    """Results one by one, each said on stderr."""
    contests = [*_contests(wanted, target_of(device))] if tune else wanted
    for number, (op, benchmark) in enumerate(contests, 1):
        floors = {machine.name: floor(benchmark, machine) for machine in MACHINES}
        dtype = str(benchmark.dtype).removeprefix("torch.")
        shape = {name: int(size) for name, size in benchmark.shape.items()}
        numbers = (benchmark.flops, benchmark.bytes, intensity(benchmark))
        result = Result(op, benchmark.name, shape, dtype, *numbers, floors)
        if measured:
            found: Measured = measure(benchmark, device, repetitions, _not_here(device))
            result.times_ms, result.failures = dict(found.times_ms), dict(found.failures)
        print(f"[{number}/{len(contests)}] {benchmark.name}", file=sys.stderr, flush=True)
        yield result


def _not_here(device: torch.device) -> dict[str, str]:
    """Compiling for a CPU takes longer than everything else and says nothing about a GPU."""
    return {} if device.type == "cuda" else {"torch.compile": "not compiled for a CPU"}


def _contests(wanted: Sequence[tuple[str, Benchmark]], target: str) -> Iterator[tuple[str, Benchmark]]:
    for op, benchmark in wanted:
        for table in tables(op):
            found = contest(benchmark, table, target)
            if found:
                yield op, found


def render(results: Sequence[Result], machine: dict[str, str]) -> str:
    """The predicted table, and the measured one where anything was."""
    titles = ["kernel", "shape", "dtype", "GFLOP", "MB", "FLOP/B"]
    for name in (machine.name for machine in MACHINES):
        titles += [f"{name} least us", "reachable", "bound"]
    lines = []
    for result in results:
        shape = _shape(result)
        counts = [f"{result.flops / 1e9:,.4g}", f"{result.bytes / 1e6:,.4g}", f"{result.intensity:,.3g}"]
        cells = [[_us(f.least_us), _us(f.reachable_us), f.bound] for f in result.floors.values()]
        lines.append([result.name, shape, result.dtype, *counts, *chain(*cells)])
    parts = [f"## Predicted\n\n{LEGEND}\n{align(titles, lines)}\n"]
    if any(result.times_ms or result.failures for result in results):
        where = machine.get("gpus", f"{machine['cpu']}, interpreted: these times mean nothing")
        parts.append(f"## Measured on {where}\n\n{MEASURED_LEGEND}\n{_measured(results, machine)}\n")
    else:
        parts.append("Nothing was measured: there is no GPU here.\n")
    return "\n".join(parts)


def _measured(results: Sequence[Result], machine: dict[str, str]) -> str:
    here: Machine | None = machine_named(machine.get("gpus", ""))
    titles = ["kernel", "shape", "contestant", "us", "min", "max", "vs megatsp", "TFLOP/s", "TB/s"]
    titles += ["of least", "of reachable", "note"]
    lines = []
    for result in results:
        ours = median(result.times_ms[OURS]) if result.times_ms.get(OURS) else None
        for name, times in result.times_ms.items():
            middle = median(times)
            rates = [result.flops / middle / 1e9, result.bytes / middle / 1e9]
            bounds = result.floors[here.name] if here else None
            shares = [bounds.least_us, bounds.reachable_us] if bounds else []
            lines.append(
                [
                    result.name,
                    _shape(result),
                    name,
                    *(_us(1e3 * ms) for ms in (middle, min(times), max(times))),
                    f"{middle / ours:.2f}" if ours else "",
                    *(f"{rate:,.3g}" if rate else "" for rate in rates),
                    *([f"{share / middle / 10:.0f}%" for share in shares] or ["", ""]),
                    "",
                ]
            )
        for name, reason in result.failures.items():
            lines.append([result.name, _shape(result), name, *[""] * 8, reason])
    return align(titles, lines)


def _tuned(results: Sequence[Result]) -> str:
    """Every config, fastest first."""
    lines = []
    for result in results:
        ranked = sorted(result.times_ms.items(), key=lambda item: median(item[1]))
        default = next(iter(result.times_ms), "")  # a table's first
        for place, (config, times) in enumerate(ranked):
            note = ", ".join(["fastest"] * (place == 0) + ["default"] * (config == default))
            lines.append([result.name, _shape(result), config, _us(1e3 * median(times)), note])
        for config, reason in result.failures.items():
            lines.append([result.name, _shape(result), config, "", reason])
    return (
        align(["kernel", "shape", "config", "us", "note"], lines)
        if lines
        else "No table here has two configs."
    )


def page(text: str, machine: dict[str, str]) -> str:
    """The tables as a document."""
    told = ", ".join(f"{name} {value}" for name, value in machine.items() if name != "measured")
    kind = "measured" if machine["measured"] == "yes" else "**predicted; nothing was measured**"
    return f"""# Kernels: time, and the least it could be

Made by `python scripts/bench/kernels.py`, {kind}: {told}.

{text}"""


def plot(results: Sequence[Result], file: Path) -> None:
    """One dot a kernel and machine: intensity and reachable time; crosses are measured times."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes: Axes = figure.add_subplot()
    least = min((result.intensity for result in results if result.intensity), default=1.0)
    at = [result.intensity or min(least, 1.0) / 4 for result in results]  # no products: at the left edge
    for number, machine in enumerate(MACHINES):
        color, marker = f"C{number}", "os"[number]
        floors = [result.floors[machine.name].reachable_us for result in results]
        label = f"{machine.name}: reachable (predicted)"
        axes.loglog(at, floors, marker, color=color, fillstyle="none", markersize=6 + 3 * number, label=label)
        knee = machine.gemm_tflops / machine.copy_tbps
        axes.axvline(knee, color=color, alpha=0.4, linestyle=":", label=f"{machine.name}: as much of both")
    ours = [
        (x, 1e3 * median(r.times_ms[OURS])) for x, r in zip(at, results, strict=True) if r.times_ms.get(OURS)
    ]
    if ours:
        axes.loglog(*zip(*ours, strict=True), "kx", label="measured here")
    for x, result in zip(at, results, strict=True):
        y = result.floors[MACHINES[0].name].reachable_us
        axes.annotate(result.name, (x, y), fontsize=6, xytext=(3, 3), textcoords="offset points")
    axes.set(xlabel="FLOP/byte (left edge: no products)", ylabel="microseconds")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=120)


def _to_json(machine: dict[str, str], results: Sequence[Result]) -> str:
    document = {"format": FORMAT, "machine": machine, "results": [asdict(result) for result in results]}
    return json.dumps(document, indent=1)


def _describe() -> dict[str, str]:
    try:
        import triton

        version: str = triton.__version__
    except ImportError:
        version = "none"
    return {**describe_machine(), "triton": version}


def _shape(result: Result) -> str:
    return " ".join(f"{name} {size:,}" for name, size in result.shape.items())


def _us(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
