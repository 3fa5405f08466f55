"""How long documents are, as a PNG."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from megatsp.data.inspect.statistics import LengthCounts

BINS_A_DECADE = 10


def plot_lengths(sources: Mapping[str, LengthCounts], seq_length: int, path: Path, title: str) -> None:
    """Documents by their length in tokens, a line a source, with seq_length marked."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, found in sources.items():
        values, edges = histogram(found)
        shown = name if len(name) <= 40 else f"...{name[-37:]}"
        axes.stairs(values, edges, fill=True, alpha=0.4, label=f"{shown} ({found.documents:,} documents)")
    axes.axvline(seq_length, color="black", linestyle="--", label=f"seq_length {seq_length:,}")
    axes.set(xscale="log", xlabel="tokens of a document", ylabel="documents", title=title)
    plain = StrMethodFormatter("{x:,.0f}")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_formatter(plain)
    axes.xaxis.set_minor_formatter(plain if high < 10 * low else NullFormatter())
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, format="png")


def histogram(found: LengthCounts) -> tuple[np.ndarray, np.ndarray]:
    """Documents of each bin and the bins' edges, whole numbers in about equal ratios; empty documents are of
    the first bin."""
    lengths = np.maximum(found.lengths, 1)
    low = np.floor(np.log10(lengths[0]) * BINS_A_DECADE)
    high = np.floor(np.log10(lengths[-1]) * BINS_A_DECADE) + 2  # the last bin reaches beyond the longest
    edges = np.unique(np.ceil(np.round(10 ** (np.arange(low, high + 1) / BINS_A_DECADE), 6)))
    values, _ = np.histogram(lengths, edges, weights=found.counts)
    return values, edges
