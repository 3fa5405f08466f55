"""A benchmark's result as text: Markdown tables that are aligned, too."""

from collections.abc import Callable, Sequence
from statistics import mean, median

from megatsp.bench.results import Report, Row, growth, notes, ratios, tflops

SPEED_LEGEND = """\
tokens/s, TFLOP/s (model FLOPs): all ranks together, the median of the repeats, min and max of tokens/s
beside it; ratio: repeat by repeat, median [min, max]; exposed: waiting for other ranks, a step.
"""
MEMORY_LEGEND = """\
Bytes (MB 10^6, GB 10^9): of the rank with the largest peak, at its peak; allocated: the allocator's
peak; moved: a step.
"""
PARTS = ("weights", "gradients", "optimizer", "activations", "communication")


def render(report: Report) -> str:
    """Tables for every sweep point and world, what their columns mean, and the machine."""
    parts = [_group_text(group, report.baseline) for group in report.groups()]
    machine = ", ".join(f"{name} {value}" for name, value in report.machine.items())
    legend = SPEED_LEGEND if any(row.speeds for row in report.rows) else ""
    legend += MEMORY_LEGEND if any(row.memory for row in report.rows) else ""
    return "\n".join([*parts, *_overview(report), *_growth_lines(report), legend + machine])


def _overview(report: Report) -> list[str]:
    """One table a quantity with a column for every sweep point and world; nothing where there is but one."""
    groups = report.groups()
    if len(groups) == 1:
        return []
    peaks = [row.memory.peak for row in report.rows if row.memory]
    unit, size = _unit(max(peaks, default=0))

    def ratio(row: Row, group: list[Row]) -> str:
        base = next((other for other in group if other.scheme == report.baseline), group[0])
        pairs = ratios(row, base)
        return f"{median(pairs):.3f}" if pairs else ""

    quantities: tuple[tuple[str, Callable[[Row, list[Row]], str]], ...] = (
        (f"ratio to {report.baseline}", ratio),
        (f"peak {unit}", lambda row, _: f"{row.memory.peak / size:,.2f}" if row.memory else ""),
        (f"allocated {unit}", lambda row, _: _allocated(row, size)),
    )
    points = [_point(group[0], len({row.world_size for row in report.rows}) > 1) for group in groups]
    tables = []
    for title, cell in quantities:
        lines = [
            [rows[0].scheme, *(cell(*pair) for pair in zip(rows, groups, strict=True))]
            for rows in zip(*groups, strict=True)
        ]
        if any(any(line[1:]) for line in lines):
            tables.append(align([title, *points], lines) + "\n")
    return tables


def _allocated(row: Row, size: int) -> str:
    return f"{row.memory.allocated / size:,.2f}" if row.memory and row.memory.allocated is not None else ""


def _point(row: Row, several_worlds: bool) -> str:
    point = [f"{key.rpartition('.')[2]}={value}" for key, value in row.point.items()]
    return ", ".join([*point, *([f"{row.world_size} ranks"] if several_worlds else [])])


def _growth_lines(report: Report) -> list[str]:
    """How each scheme's time grows along the sweep; nothing where all points do equal work."""
    lines: dict[tuple[str, int], list[Row]] = {}
    for row in report.rows:
        lines.setdefault((row.scheme, row.world_size), []).append(row)
    found = {key: growth(rows) for key, rows in lines.items()}
    cells = [[name, str(ranks), f"{x:.3f}"] for (name, ranks), x in found.items() if x is not None]
    title = "time of a step ~ (its model FLOPs)^x, fitted over the sweep:\n"
    return [title, align(["scheme", "ranks", "x"], cells) + "\n"] if cells else []


def _group_text(group: list[Row], baseline: str) -> str:
    first = group[0]
    trainer = first.config["trainer"]
    point = "".join(f"{key.rpartition('.')[2]}={value}, " for key, value in first.point.items())
    work = (
        f"{trainer['global_batch_size']} x {first.seq_length} tokens a step, {trainer['dtype']}, "
        f"recompute {trainer['recompute_granularity']}"
    )
    ranks = f"{first.world_size} rank{'s' * (first.world_size > 1)}"
    tables = [_main_table(group, baseline), _moved_table(group)]
    return f"{point}{ranks} ({work}):\n\n" + "\n".join(f"{table}\n" for table in tables if table)


def _main_table(group: list[Row], baseline: str) -> str:
    base = next((row for row in group if row.scheme == baseline), group[0])
    peaks = [row.memory.peak for row in group if row.memory]
    unit, size = _unit(max(peaks, default=0))
    titles = ["scheme", "tokens/s", "min", "max", f"ratio to {baseline}", "TFLOP/s", "exposed ms", "loss"]
    titles += [f"peak {unit}", *PARTS, "allocated", "moved", "note"]
    lines = [
        [row.scheme, *_speed_cells(row, base), *_memory_cells(row, size), notes(row, group)] for row in group
    ]
    return align(titles, lines)


def _speed_cells(row: Row, base: Row) -> list[str]:
    if not row.speeds:
        return [""] * 7
    rates, pairs = row.tokens_per_s, ratios(row, base)
    ratio = f"{median(pairs):.3f} [{min(pairs):.3f}, {max(pairs):.3f}]" if pairs else ""
    exposed = mean(speed.exposed_ms for speed in row.speeds.values())
    return [
        *map(_number, (median(rates), min(rates), max(rates))),
        "1" if row is base else ratio,
        f"{tflops(row):.3g}",
        _number(exposed),
        f"{row.loss:.5f}",
    ]


def _memory_cells(row: Row, size: int) -> list[str]:
    memory = row.memory
    if memory is None:
        return [""] * (len(PARTS) + 3)
    parts = [getattr(memory, part) for part in PARTS]
    found = [memory.peak, *parts, memory.allocated, sum(memory.moved.values())]
    return ["" if value is None else f"{value / size:,.2f}" for value in found]


def _moved_table(group: list[Row]) -> str:
    """Bytes by collective; "" where no rank moves any."""
    moved = {row.scheme: row.memory.moved for row in group if row.memory}
    names = sorted({name for found in moved.values() for name in found})
    if not names:
        return ""
    unit, size = _unit(max(sum(found.values()) for found in moved.values()))
    titles = [f"moved, {unit} a step", *names]
    lines = [[s, *(f"{found.get(name, 0) / size:,.2f}" for name in names)] for s, found in moved.items()]
    return align(titles, lines)


def align(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table: numbers to the right, columns that are empty throughout left out.

    A column `note` is the last, to the left and, as its cells can be long, not padded.
    """
    kept = [i for i in range(len(titles)) if i == 0 or any(line[i] for line in lines)]
    table = [[line[i] for i in kept] for line in (titles, *lines)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    has_note = table[0][-1] == "note"
    numbers = range(1, len(kept) - has_note)
    rule = ["-" * width for width in widths]
    for i in numbers:
        rule[i] = rule[i][1:] + ":"
    if has_note:
        rule[-1] = "----"
    text = []
    for line in (table[0], rule, *table[1:]):
        cells = [line[0].ljust(widths[0]), *(line[i].rjust(widths[i]) for i in numbers)]
        cells += line[-1:] if has_note else []
        text.append(f"| {' | '.join(cells)} |")
    return "\n".join(text)


def _unit(largest: int) -> tuple[str, int]:
    """The unit for numbers of up to `largest` bytes: its name and its bytes."""
    return ("GB", 10**9) if largest >= 10**10 else ("MB", 10**6)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
