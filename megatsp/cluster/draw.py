"""`--show-mesh`: nodes, GPUs and axes of a mesh, as text and as a picture."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatsp.cluster.mesh import Place, coordinates, place
from megatsp.schema import AXES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ROW = 8  # GPUs of a row of text or boxes
_WHOLE = 16  # with more nodes, the first and the last are shown
_FIRST = 3
# Light enough for black text, and told apart in grey by their order.
_COLOURS = ("#9ecae1", "#fdd0a2", "#a1d99b", "#dadaeb", "#fcbba1", "#d9d9d9", "#ffeda0", "#c7e9e4")


def mesh_text(sizes: Mapping[str, int], ranks_per_node: int) -> str:
    """The ranks of each node with their coordinates, then each axis with its groups and where they lie."""
    nodes = _num_nodes(sizes, ranks_per_node)
    axes = _shown_axes(sizes)
    lines = [f"{_title(sizes, ranks_per_node)}; each GPU: rank ({', '.join(axes)})"]
    for node in _shown_nodes(nodes):
        lines += _gap(nodes) if node is None else _node_lines(node, sizes, ranks_per_node)
    lines.append("")
    rows = [("axis", "ranks", "groups", "where", "")]
    for axis in axes:
        found = place(axis, sizes, ranks_per_node)
        groups = [_group_text(group) for group in found.groups]
        which = "; ".join(groups if len(groups) <= 3 else [*groups[:2], "...", groups[-1]])
        rows.append((axis, f"{sizes[axis]}", f"{len(groups)}", where(found), which))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        lines.append("  ".join([*cells, row[4]]).rstrip())
    return "\n".join(lines)


def where(found: Place) -> str:
    """Where the groups of an axis lie, in words."""
    if found.nodes == 1:
        return "inside a node"
    rails = "on the same rails of each" if found.keeps_rails else "from rail to rail"
    return f"across {found.nodes} nodes, {rails}"


def draw_mesh(sizes: Mapping[str, int], ranks_per_node: int, path: Path) -> None:
    """Writes a PNG: a box a node with its GPUs, coloured by tsp (or tp) group; rails are columns.

    Of more than 16 nodes the first three and the last are drawn.

    Raises:
        ValueError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    nodes = _num_nodes(sizes, ranks_per_node)
    columns = min(ranks_per_node, _ROW)
    box = math.ceil(ranks_per_node / columns) + 0.45  # rows of GPUs, and a margin
    shown = list(_shown_nodes(nodes))
    height = sum(box if node is not None else 0.9 for node in shown)
    lines = _legend(sizes, ranks_per_node)
    width = max(columns + 1.3, 8.0)
    inches = 0.85 * height + 0.28 * len(lines) + 1.0
    figure = Figure(figsize=(width * 1.05, inches), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlim(-1.2, width - 1.1)
    axes.set_ylim(height, -0.35)
    axes.axis("off")
    axes.set_title(_title(sizes, ranks_per_node), fontsize=13, loc="left", fontweight="bold")
    for column in range(columns):
        name = f"GPU {column}" if ranks_per_node <= columns else f"GPU {column}, {column + columns}, ..."
        axes.text(column + 0.5, -0.12, name, ha="center", va="center", fontsize=9, color="#555555")
    top = 0.1
    if _has_rails(sizes, ranks_per_node):
        for column in range(columns):  # the rails, behind the nodes
            rail = [column + 0.5] * 2
            axes.plot(rail, [top + 0.5, height - box + 0.5], color="#bbbbbb", linewidth=1.2, zorder=0)
    for node in shown:
        if node is None:
            text = _gap(nodes)[0].strip()
            grey: dict[str, Any] = dict(color="#555555", backgroundcolor="white")
            axes.text(columns / 2, top + 0.35, text, ha="center", va="center", fontsize=11, **grey)
            top += 0.9
            continue
        _draw_node(axes, node, top, sizes, ranks_per_node)
        top += box
    figure.supxlabel("\n".join(lines), fontsize=10, ha="left", x=0.02, family="monospace")
    try:
        figure.savefig(path, dpi=110, format="png")
    except OSError as error:
        raise ValueError(
            f"cannot write {path}: {error.strerror}; give a file in a folder that exists"
        ) from None


def _draw_node(axes: "Axes", node: int, top: float, sizes: Mapping[str, int], ranks_per_node: int) -> None:
    from matplotlib.patches import FancyBboxPatch, Rectangle

    columns = min(ranks_per_node, _ROW)
    rows = math.ceil(ranks_per_node / columns)
    frame: dict[str, Any] = dict(
        boxstyle="round,pad=0,rounding_size=0.1", facecolor="white", edgecolor="#444444"
    )
    axes.add_patch(FancyBboxPatch((-0.06, top - 0.06), columns + 0.12, rows + 0.12, linewidth=1.4, **frame))
    axes.text(-0.2, top + rows / 2, f"node {node}", ha="right", va="center", fontsize=11)
    shape = [sizes[axis] for axis in AXES]
    inner = sizes["tsp"] * sizes["tp"]
    for gpu, rank in enumerate(_ranks_of(node, sizes, ranks_per_node)):
        x, y = gpu % columns, top + gpu // columns
        colour = _COLOURS[rank // inner % len(_COLOURS)]
        cell = Rectangle(
            (x + 0.05, y + 0.06), 0.9, 0.88, facecolor=colour, edgecolor="#777777", linewidth=0.6
        )
        axes.add_patch(cell)
        at = coordinates(rank, shape)
        named = "\n".join(f"{axis} {at[axis]}" for axis in _shown_axes(sizes))
        axes.text(x + 0.5, y + 0.26, f"{rank}", ha="center", va="center", fontsize=12, fontweight="bold")
        axes.text(x + 0.5, y + 0.65, named, ha="center", va="center", fontsize=7.5, linespacing=1.1)


def _legend(sizes: Mapping[str, int], ranks_per_node: int) -> list[str]:
    """What stands below the picture."""
    colour = "tsp" if sizes["tsp"] > 1 or sizes["tp"] == 1 else "tp"
    lines = [f"one colour: one {colour} group"] if sizes[colour] > 1 else []
    if _has_rails(sizes, ranks_per_node):
        lines.append("columns: the rails between nodes")
    for axis in _shown_axes(sizes):
        found = place(axis, sizes, ranks_per_node)
        groups = f"{len(found.groups)} group{'s' * (len(found.groups) > 1)} of {sizes[axis]}"
        lines.append(f"{axis:<12} {groups:<18} {where(found)}")
    return lines


def _has_rails(sizes: Mapping[str, int], ranks_per_node: int) -> bool:
    """Whether there are nodes to be joined, each of one row of GPUs."""
    return ranks_per_node <= _ROW and _num_nodes(sizes, ranks_per_node) > 1


def _title(sizes: Mapping[str, int], ranks_per_node: int) -> str:
    nodes = _num_nodes(sizes, ranks_per_node)
    mesh = " x ".join(f"{axis} {sizes[axis]}" for axis in _shown_axes(sizes))
    world_size = math.prod(sizes[axis] for axis in AXES)
    on = f"{nodes} nodes of {ranks_per_node}" if nodes > 1 else "1 node"
    return f"{world_size} rank{'s' * (world_size > 1)} on {on}: {mesh}"


def _shown_axes(sizes: Mapping[str, int]) -> list[str]:
    """Those of several ranks; of one rank alone, tsp."""
    return [axis for axis in AXES if sizes[axis] > 1] or ["tsp"]


def _num_nodes(sizes: Mapping[str, int], ranks_per_node: int) -> int:
    return math.ceil(math.prod(sizes[axis] for axis in AXES) / ranks_per_node)


def _shown_nodes(nodes: int) -> Iterator[int | None]:
    """The nodes that are shown; None stands for those between."""
    if nodes <= _WHOLE:
        yield from range(nodes)
    else:
        yield from (*range(_FIRST), None, nodes - 1)


def _gap(nodes: int) -> list[str]:
    return [f"  ... {nodes - _FIRST - 1} more nodes ..."]


def _ranks_of(node: int, sizes: Mapping[str, int], ranks_per_node: int) -> range:
    world_size = math.prod(sizes[axis] for axis in AXES)
    return range(node * ranks_per_node, min(world_size, (node + 1) * ranks_per_node))


def _node_lines(node: int, sizes: Mapping[str, int], ranks_per_node: int) -> Iterator[str]:
    shape = [sizes[axis] for axis in AXES]
    world_size = math.prod(shape)
    widest = len(_cell(world_size - 1, shape, sizes))
    label = f"node {node}".ljust(5 + len(str(_num_nodes(sizes, ranks_per_node) - 1)))
    ranks = _ranks_of(node, sizes, ranks_per_node)
    for begin in range(0, len(ranks), _ROW):
        cells = [_cell(rank, shape, sizes).ljust(widest) for rank in ranks[begin : begin + _ROW]]
        yield "  ".join([f"  {label}", *cells]).rstrip()
        label = " " * len(label)


def _cell(rank: int, shape: Sequence[int], sizes: Mapping[str, int]) -> str:
    """A rank with its coordinates on the axes that are shown."""
    at = coordinates(rank, shape)
    return f"{rank} ({','.join(str(at[axis]) for axis in _shown_axes(sizes))})"


def _group_text(group: range) -> str:
    """A group's ranks: 0-7, or 0 8 16 ... 1016."""
    if len(group) > 1 and group.step == 1:
        return f"{group[0]}-{group[-1]}"
    ranks = [str(rank) for rank in group]
    return " ".join(ranks if len(ranks) <= 4 else [*ranks[:3], "...", ranks[-1]])
