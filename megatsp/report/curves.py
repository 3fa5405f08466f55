"""A run's numbers as SVG drawings, each a data: URI."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from operator import mul
from typing import Any

_MOST_POINTS = 1500  # of a line: a page of a long run stays small


@dataclass(frozen=True)
class Plot:
    """names: the metrics that it shows, with their legends. is_log: whether the y-axis is logarithmic."""

    title: str
    unit: str
    names: tuple[tuple[str, str], ...]
    is_log: bool = False


PLOTS = (
    Plot("Loss", "nats per token", (("lm loss", "training"), ("val/lm loss", "validation"))),
    Plot("Learning rate", "", (("learning-rate", ""),)),
    Plot("Gradient norm", "before clipping", (("grad-norm", ""),), is_log=True),
    Plot("Throughput", "tokens/s per GPU", (("tokens/s/gpu", ""),)),
    Plot("Model FLOP/s", "TFLOP/s per GPU", (("tflops/gpu", ""),)),
    Plot("Model FLOP utilisation", "share of the peak", (("mfu", ""),)),
    Plot(
        "Time of an iteration", "ms", (("iteration-time-ms", "in all"), ("comm/exposed-ms", "exposed comm"))
    ),
    Plot("Peak memory", "GiB, rank 0", (("memory/peak-gib", ""),)),
)


def drawings(metrics: Sequence[dict[str, Any]], checkpoints: Sequence[int]) -> list[tuple[str, str]]:
    """Title and data: URI of each plot that has a point; against iterations, and consumed tokens above.

    checkpoints: iterations, marked at the bottom.
    """
    found = []
    tokens = _tokens(metrics)
    for plot in PLOTS:
        lines = [(label, _points(metrics, name)) for name, label in plot.names]
        if any(points for _, points in lines):
            svg = _draw(plot, [(label, points) for label, points in lines if points], tokens, checkpoints)
            found.append((plot.title, f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"))
    return found


def _points(metrics: Sequence[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """Iteration and value of each entry that has it."""
    return [(entry["iteration"], entry[name]) for entry in metrics if name in entry]


def thinned(points: Sequence[tuple[int, float]], most: int = _MOST_POINTS) -> list[tuple[int, float]]:
    """At most so many points: of each stretch its lowest and its highest, so that no spike is lost."""
    if len(points) <= most:
        return list(points)
    stretches = most // 2
    kept = []
    for i in range(stretches):
        part = points[i * len(points) // stretches : (i + 1) * len(points) // stretches]
        low, high = (end(range(len(part)), key=lambda k: part[k][1]) for end in (min, max))
        kept += [part[k] for k in sorted({low, high})]
    return kept


def _tokens(metrics: Sequence[dict[str, Any]]) -> float:
    """Consumed tokens an iteration; 0 where it is not known."""
    last = next((e for e in reversed(metrics) if e.get("consumed-tokens") and e["iteration"]), None)
    return last["consumed-tokens"] / last["iteration"] if last is not None else 0.0


def _draw(
    plot: Plot,
    lines: Sequence[tuple[str, Sequence[tuple[int, float]]]],
    tokens: float,
    checkpoints: Sequence[int],
) -> bytes:
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    with rc_context({"svg.hashsalt": "megatsp", "font.size": 11}):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.add_subplot()
        for number, (label, points) in enumerate(lines):
            few = len(points) <= 60
            at, values = zip(*thinned(points), strict=True)
            color, marker = ("#1f6feb", "#d1570a")[number], "o" if few else ""
            axes.plot(at, values, color=color, marker=marker, markersize=3.5, label=label, linewidth=1.4)
        if plot.is_log and all(value > 0 for _, points in lines for _, value in points):
            axes.set_yscale("log")
        axes.set(xlabel="iteration", ylabel=plot.unit)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if tokens:
            above = axes.secondary_xaxis("top", functions=(partial(mul, tokens), partial(mul, 1 / tokens)))
            above.xaxis.set_major_locator(MaxNLocator(5))
            above.xaxis.set_major_formatter(EngFormatter(sep=""))
            above.set_xlabel("consumed tokens")
        first, last = axes.get_xlim()
        shown = [i for i in checkpoints if first <= i <= last]
        axes.plot(shown, [0.015] * len(shown), "^", color="#57606a", markersize=4,
                  transform=axes.get_xaxis_transform())  # fmt: skip
        axes.grid(alpha=0.3)
        axes.spines[["right"]].set_visible(False)
        if len(lines) > 1:
            axes.legend(frameon=False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
