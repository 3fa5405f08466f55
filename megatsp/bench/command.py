"""`megatsp bench`: schemes side by side on this machine, as a table, JSON and plots."""

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from megatsp.axes import choose_device
from megatsp.bench import schemes as spec
from megatsp.bench.longest import GB, Longest, find_longest, with_length
from megatsp.bench.longest import render as render_longest
from megatsp.bench.machine import describe_machine
from megatsp.bench.measure import REFERENCES
from megatsp.bench.memory import StepMemory
from megatsp.bench.plot import plot
from megatsp.bench.ranks import RanksFailedError
from megatsp.bench.results import Report, Row
from megatsp.bench.runner import Settings, memory_of, plan, reason, run
from megatsp.bench.schemes import Case, Scheme
from megatsp.bench.table import render
from megatsp.checkpoint.paths import replace_text
from megatsp.launcher import INTERRUPTED
from megatsp.training.flops import flops_per_token


@dataclass(frozen=True)
class Output:
    """Where a result goes. json: a file, "-" (printed instead of the table) or "" (nowhere)."""

    json: str = ""
    plot: Path | None = None


@dataclass(frozen=True)
class Wanted:
    """What to compare, as the command line says it. worlds: empty is launch.nproc alone."""

    overrides: list[str] = field(default_factory=list)
    schemes: Sequence[str] = spec.DEFAULT_SCHEMES
    worlds: Sequence[int] = ()
    sweeps: Sequence[str] = ()
    config_dir: Path | None = None


def bench(wanted: Wanted, settings: Settings, output: Output, command: list[str]) -> int:
    """Measures and shows; returns 0, 1 if no scheme could be measured, or 130 after Ctrl-C.

    command: what a result says it was made by.

    Raises:
        ValueError: what was wanted makes no sense; nothing was measured.
    """
    schemes, cases = _cases(wanted, settings)
    rows = [make_row(case, settings) for case in cases]
    report = Report(command, describe_machine(), spec.baseline(schemes).label, rows)
    _check_output(output)

    def save() -> None:
        if output.json not in ("", "-"):
            replace_text(Path(output.json), report.to_json())

    status = 0
    try:
        save()
        run(plan(rows, cases, settings), settings, save)
    except KeyboardInterrupt:
        status = INTERRUPTED
        print("megatsp: interrupted; this is what was measured before", file=sys.stderr)
    show(report, output)
    return status or int(not any(row.speeds or row.memory for row in rows))


def _cases(wanted: Wanted, settings: Settings) -> tuple[list[Scheme], list[Case]]:
    schemes = spec.parse_schemes(wanted.schemes, REFERENCES, wanted.config_dir)
    sweeps = [spec.parse_sweep(text) for text in wanted.sweeps]
    cases = spec.make_cases(wanted.overrides, schemes, sweeps, wanted.worlds, wanted.config_dir)
    _check_rank(cases, settings)
    return schemes, cases


def longest(wanted: Wanted, settings: Settings, limit_gb: float) -> int:
    """Prints the longest sequence that fits a rank, for every scheme; returns 0, or 130 after Ctrl-C.

    Raises:
        ValueError: as `bench`.
    """
    _, cases = _cases(wanted, settings)
    limit_bytes, status = int(limit_gb * GB), 0
    found: list[tuple[Case, Longest, str]] = []
    try:
        for case in cases:
            found.append((case, *_longest_of(case, settings, limit_bytes)))
            print(f"[{len(found)}/{len(cases)}] {case.scheme.label}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        status = INTERRUPTED
    if found:
        print(f"{render_longest(found, limit_bytes)}")
    return status


def _longest_of(case: Case, settings: Settings, limit_bytes: int) -> tuple[Longest, str]:
    refused = make_row(case, settings).refused
    if refused:
        return Longest(0, None), " ".join(refused.split())
    failures = []

    def peak(seq_length: int) -> StepMemory | None:
        try:
            return memory_of(replace(case, config=with_length(case, seq_length)), settings)
        except (RanksFailedError, TimeoutError) as error:
            why = reason(error) if isinstance(error, RanksFailedError) else str(error)
            failures.append(f"T = {seq_length:,} was not simulated: {why}")
            return None

    found = find_longest(peak, case.config.trainer.seq_length, 2 * case.world_size, limit_bytes)
    return found, "; ".join(failures)


def show_file(path: Path, output: Output) -> int:
    """Prints and plots what `--json` wrote.

    Raises:
        ValueError: no such file, or another.
    """
    try:
        report = Report.from_json(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"--from {path}: {error}") from error
    _check_output(output)
    show(report, output)
    return 0


def show(report: Report, output: Output) -> None:
    """Prints the result and writes its plots."""
    if output.json == "-":
        print(report.to_json())
    else:
        print(f"{render(report)}\n{shlex.join(report.command)}")
    for path in plot(report, output.plot) if output.plot else ():
        print(f"wrote {path}", file=sys.stderr)


def _check_output(output: Output) -> None:
    """Refuses before the measuring what could not be written after it."""
    if output.json not in ("", "-"):
        folder = Path(output.json).parent
        if not os.access(folder, os.W_OK) or Path(output.json).is_dir():
            raise ValueError(f"--json {output.json}: give a file in a folder that exists and can be written")
    if output.plot:
        try:
            output.plot.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--plot {output.plot}: give a folder ({error.strerror})") from error


def _check_rank(cases: Sequence[Case], settings: Settings) -> None:
    smallest = min(case.world_size for case in cases)
    if settings.rank is not None and not 0 <= settings.rank < smallest:
        raise ValueError(f"--rank {settings.rank}: must be in [0, {smallest})")


def make_row(case: Case, settings: Settings) -> Row:
    """The row of a case, without measurements yet; raises as `bench`."""
    refused = case.refused or _refused_by_machine(case, settings)
    config = case.config
    flops = flops_per_token(config.model, config.trainer.seq_length, config.finetune)
    return Row(case.point, case.world_size, case.scheme.label, asdict(case.config), flops, refused)


def _refused_by_machine(case: Case, settings: Settings) -> str:
    """Why this machine cannot run a case, or "".

    Raises:
        ValueError: a GPU is wanted and there is none at all.
    """
    if settings.memory == "simulate":
        return "" if not case.scheme.is_reference else "only the schemes of configs/parallel are simulated"
    if settings.memory == "one_rank" and case.scheme.is_reference:
        return "has no ranks"
    ranks = 1 if settings.memory == "one_rank" else case.world_size
    if choose_device(case.config.launch.device).type == "cuda" and ranks > torch.cuda.device_count():
        return f"{ranks} ranks need {ranks} GPUs, and this machine has {torch.cuda.device_count()}"
    return ""
