"""A benchmark's result as PNGs: speed and peak memory against what was swept."""

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from megatsp.bench.results import Report, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MB = 10**6
Values = Callable[[Row], list[float]]  # what is drawn of a row; empty where it has none


def plot(report: Report, folder: Path) -> list[Path]:
    """Writes tokens_per_s.png and peak_memory.png into `folder`, one line a scheme.

    Against T, or else against the first swept key, or else against the number of ranks. Other
    swept keys split a scheme's line. Error bars: smallest and largest repeat. Returns what it wrote:
    a quantity that no row has makes no file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    axis = _axis(report)
    quantities: tuple[tuple[str, str, Values], ...] = (
        ("tokens_per_s", "tokens/s, all ranks (median, min to max)", lambda row: row.tokens_per_s),
        (
            "peak_memory",
            "peak MB (10^6 bytes) of a rank",
            lambda row: [row.memory.peak / MB] if row.memory else [],
        ),
    )
    written = []
    for name, title, values in quantities:
        if any(map(values, report.rows)):
            written.append(folder / f"{name}.png")
            _draw(report, axis, values, title, written[-1])
    return written


def _axis(report: Report) -> str:
    """The key on the x-axis; `world` is the number of ranks."""
    keys = list(report.rows[0].point)
    several_worlds = len({row.world_size for row in report.rows}) > 1
    if "trainer.seq_length" in keys or (not keys and not several_worlds):
        return "trainer.seq_length"
    return keys[0] if keys else "world"


def _draw(report: Report, axis: str, values: Values, title: str, path: Path) -> None:
    """Lines of one quantity; a scheme has the same colour in every plot of a report."""
    from matplotlib.figure import Figure

    places: dict[str, float] = {}  # a value that is no number stands where it came in the order
    several_worlds = len({row.world_size for row in report.rows}) > 1
    lines: dict[str, list[Row]] = {}
    for row in report.rows:
        text = _place(row, axis)
        places.setdefault(text, float(text) if _is_number(text) else len(places))
        lines.setdefault(_label(row, axis, several_worlds), []).append(row)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for number, (label, line) in enumerate(lines.items()):
        points = sorted((places[_place(row, axis)], values(row)) for row in line if values(row))
        if points:
            middle = [median(found) for _, found in points]
            below = [m - min(found) for m, (_, found) in zip(middle, points, strict=True)]
            above = [max(found) - m for m, (_, found) in zip(middle, points, strict=True)]
            at = [place for place, _ in points]
            color = f"C{number}"
            axes.errorbar(at, middle, yerr=[below, above], fmt="o-", capsize=3, color=color, label=label)
    if all(map(_is_number, places)) and min(places.values()) > 0:
        axes.set_xscale("log", base=2)
    axes.set_xticks([*places.values()], [*places])
    axes.tick_params(axis="x", which="minor", bottom=False)
    _scale_values(axes)
    names = {"trainer.seq_length": "T (tokens of a sample)", "world": "ranks"}
    axes.set(xlabel=names.get(axis, axis), ylabel=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def _scale_values(axes: "Axes") -> None:
    """A logarithmic y-axis with round numbers on it, also where it spans less than a decade."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    narrow = high < 10 * low
    axes.yaxis.set_major_locator(MaxNLocator(6) if narrow else LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.4g}" if value < 1e4 else f"{value:,.0f}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _place(row: Row, axis: str) -> str:
    if axis == "world":
        return str(row.world_size)
    return row.point.get(axis) or str(row.seq_length)


def _label(row: Row, axis: str, several_worlds: bool) -> str:
    others = [f"{key.rpartition('.')[2]}={value}" for key, value in row.point.items() if key != axis]
    if several_worlds and axis != "world":
        others.append(f"{row.world_size} ranks")
    return ", ".join([row.scheme, *others])


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
