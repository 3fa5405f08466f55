"""Runs the measurements of a benchmark, each in fresh processes, and keeps every one that worked."""

import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tqdm import tqdm

from megatsp.bench.measure import REFERENCES, Speed, lone_memory, measure_speed, rank_memory
from megatsp.bench.memory import StepMemory
from megatsp.bench.ranks import PRELOAD, RanksFailedError, run_ranks
from megatsp.bench.results import Failure, Row
from megatsp.bench.schemes import Case
from megatsp.bench.step import TrainStep

_PRELOAD = (*PRELOAD, "megatsp.bench.measure")
TRIES = 2  # a scheme that failed so often at a point is not tried again there


@dataclass(frozen=True)
class Settings:
    """How to measure. repeats 0: no timing.

    memory: "ranks" (on all of a scheme's ranks), "simulate" or "one_rank" (see
    megatsp.bench.memory; of rank `rank`, or None: of the first and the last), or "" for none.
    timeout_s: of one measurement.
    """

    repeats: int = 5
    steps: int = 1
    warmup: int = 1
    timeout_s: float = 600.0
    memory: str = "ranks"
    rank: int | None = None


@dataclass(frozen=True)
class Task:
    """One measurement of one row. repeat: from 0; None measures memory."""

    row: Row
    case: Case
    repeat: int | None

    @property
    def name(self) -> str:
        return "memory" if self.repeat is None else f"repeat {self.repeat + 1}"

    def __str__(self) -> str:
        point = "".join(f"{key}={value}, " for key, value in self.case.point.items())
        ranks = f"{self.case.world_size} rank{'s' * (self.case.world_size > 1)}"
        return f"{self.case.scheme.label}, {point}{ranks}, {self.name}"


def plan(rows: Sequence[Row], cases: Sequence[Case], settings: Settings) -> list[Task]:
    """The measurements, in their order.

    A repeat visits every scheme at every point before the next begins, and begins with another
    scheme, so that what drifts on this machine hits all alike. Memory, which is exact, comes last.
    """
    pairs = [(row, case) for row, case in zip(rows, cases, strict=True) if not row.refused]
    groups: dict[str, list[tuple[Row, Case]]] = {}
    for row, case in pairs:
        groups.setdefault(f"{case.point} {case.world_size}", []).append((row, case))
    tasks = []
    for repeat in range(settings.repeats):
        for group in groups.values():
            first = repeat % len(group)
            tasks += [Task(row, case, repeat) for row, case in group[first:] + group[:first]]
    if settings.memory:
        tasks += [Task(row, case, None) for row, case in pairs if not case.scheme.is_reference]
    return tasks


def run(tasks: Sequence[Task], settings: Settings, save: Callable[[], None]) -> None:
    """Runs the tasks, writing what they find, or why they failed, into their rows.

    Says on stderr how far it is. save: called after each.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM; the task in hand is abandoned, its processes killed.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for task in _with_progress(tasks):
            if not _is_hopeless(task, settings):
                _run_one(task, settings)
                save()
    finally:
        signal.signal(signal.SIGTERM, before)


def _is_hopeless(task: Task, settings: Settings) -> bool:
    """Whether it failed too often; or, for memory, never ran."""
    never_ran = task.repeat is None and settings.repeats > 0 and not task.row.speeds
    return never_ran or len(task.row.failures) >= TRIES


def _run_one(task: Task, settings: Settings) -> None:
    row = task.row
    try:
        if task.repeat is None:
            row.memory = memory_of(task.case, settings)
        else:
            row.speeds[task.repeat] = _speed(task.case, settings)
    except RanksFailedError as error:
        row.failures.append(Failure(task.name, reason(error), str(error)))
    except TimeoutError as error:
        row.failures.append(Failure(task.name, f"timed out: {error}", ""))


def _speed(case: Case, settings: Settings) -> Speed:
    factory = REFERENCES[case.scheme.name] if case.scheme.is_reference else TrainStep
    arguments = (case.config, factory, settings.warmup, settings.steps)
    return _on_ranks(case, settings, measure_speed, *arguments)[0]


def memory_of(case: Case, settings: Settings) -> StepMemory:
    """Of the rank with the largest peak.

    Raises:
        RanksFailedError, TimeoutError: as `run_ranks`.
    """
    if settings.memory == "ranks":
        found = _on_ranks(case, settings, rank_memory, case.config)
    else:
        last = case.world_size - 1
        chosen = sorted({0, last}) if settings.rank is None else [settings.rank]
        found = []
        for rank in chosen:
            arguments = (case.config, case.world_size, rank, settings.memory == "simulate")
            found += run_ranks(
                lone_memory,
                1,
                *arguments,
                join=False,
                quiet=True,
                timeout_s=settings.timeout_s,
                preload=_PRELOAD,
            )
    return max(found, key=lambda memory: memory.peak)


def _on_ranks(case: Case, settings: Settings, fn: Callable, *arguments: object) -> list:
    return run_ranks(
        fn,
        case.world_size,
        *arguments,
        device=case.config.launch.device,
        quiet=True,
        timeout_s=settings.timeout_s,
        preload=_PRELOAD,
    )


def reason(error: RanksFailedError) -> str:
    """Why ranks failed, in a line: the first cause, and whether memory ran out."""
    cause = next((f for f in error.failures if _ran_out(f.summary)), error.failures[0])
    text = " ".join(cause.summary.split())
    if "exit code -9" in text:
        return f"rank {cause.rank} was killed (SIGKILL): most likely out of memory"
    shown = text if len(text) <= 200 else text[:199] + "…"
    return ("out of memory: " if _ran_out(text) else "") + f"rank {cause.rank}: {shown}"


def _ran_out(summary: str) -> bool:
    """Whether an exception is that of torch's GPU or CPU allocator."""
    return "OutOfMemoryError" in summary or "can't allocate memory" in summary


def _with_progress(tasks: Sequence[Task]) -> Iterator[Task]:
    """The tasks, with a bar on a terminal, and a line a finished task elsewhere."""
    on_terminal = sys.stderr.isatty()
    with tqdm(total=len(tasks), disable=not on_terminal, leave=False, unit="run") as bar:
        for number, task in enumerate(tasks, 1):
            bar.set_postfix_str(str(task))
            yield task
            bar.update()
            if not on_terminal:
                print(f"[{number}/{len(tasks)}] {task}: {_outcome(task)}", file=sys.stderr, flush=True)


def _outcome(task: Task) -> str:
    row = task.row
    if task.repeat is not None and task.repeat in row.speeds:
        return f"{row.speeds[task.repeat].tokens_per_s:,.0f} tokens/s"
    if task.repeat is None and row.memory is not None:
        return f"peak {row.memory.peak / 10**6:,.1f} MB"
    return row.failures[-1].reason if row.failures else "left out"
