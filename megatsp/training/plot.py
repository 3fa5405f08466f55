"""The loss curve as a PNG, for people who would rather look."""

from pathlib import Path
from typing import Any


def plot_loss(entries: list[dict[str, Any]], path: Path, title: str) -> None:
    """Training and validation loss against consumed tokens, from metrics.jsonl entries."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for key, label, style in (("lm loss", "training", "-"), ("val/lm loss", "validation", "o-")):
        points = [(e["consumed-tokens"], e[key]) for e in entries if e.get(key) is not None]
        if points:
            axes.plot(
                *zip(*points, strict=True), style, label=f"{label} (last {points[-1][1]:.3f})", markersize=4
            )
    axes.set(xlabel="consumed tokens", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
