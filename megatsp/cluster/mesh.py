"""Where each rank stands on the mesh, in plain Python: for programs that are to start without torch.

Ranks are numbered node by node, and row by row over `schema.AXES`, whose last axis is innermost:
the same as `Axes`. GPU i of every node is on rail i: a network that need not reach the other rails.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatsp.parallel_rules import divisors
from megatsp.schema import AXES

_BY_THE_NODE = ("tsp", "tp")  # axes whose ranks exchange weights and activations in every layer


def coordinates(rank: int, sizes: Sequence[int]) -> dict[str, int]:
    """A rank's place on every axis. sizes: ranks of each axis, in the order of AXES."""
    found = {}
    for axis, size in zip(reversed(AXES), reversed(sizes), strict=True):
        rank, found[axis] = divmod(rank, size)
    assert rank == 0, "a rank outside the mesh"
    return {axis: found[axis] for axis in AXES}


def groups(axis: str, sizes: Mapping[str, int]) -> list[range]:
    """The groups of one axis, each as its ranks in order."""
    names = list(AXES)
    inner = 1
    for name in names[names.index(axis) + 1 :]:
        inner *= sizes[name]
    world = 1
    for name in names:
        world *= sizes[name]
    span = inner * sizes[axis]
    return [range(s + i, s + span, inner) for s in range(0, world, span) for i in range(inner)]


@dataclass(frozen=True)
class Place:
    """Where the groups of one axis lie.

    nodes: how many a group lies on, at most. keeps_rails: whether each group has the same GPUs on each of its
    nodes, so that no two rails need meet.
    """

    axis: str
    groups: list[range]
    nodes: int
    keeps_rails: bool


def place(axis: str, sizes: Mapping[str, int], ranks_per_node: int) -> Place:
    """Where the groups of an axis lie on nodes of so many ranks."""
    found = groups(axis, sizes)
    layouts = [_by_node(group, ranks_per_node) for group in found]
    keeps = all(len({tuple(gpus) for gpus in layout.values()}) == 1 for layout in layouts)
    return Place(axis, found, max(map(len, layouts)), keeps)


def placement_errors(sizes: Mapping[str, int], ranks_per_node: int) -> list[str]:
    """Why ranks cannot stand like this on nodes of so many (launch.nproc), one line each.

    Whole nodes are filled, and tsp and tp groups lie inside one: their ranks exchange all weights or
    activations of every layer, which only links inside a node are fast enough for.
    """
    world_size = math.prod(sizes[axis] for axis in AXES)
    if world_size <= ranks_per_node:
        return []
    errors = []
    if world_size % ranks_per_node:
        errors.append(
            f"the mesh has {world_size} ranks, which do not fill whole nodes of {ranks_per_node} "
            f"(launch.nproc); make them a multiple of {ranks_per_node}"
        )
    inner = math.prod(sizes[axis] for axis in _BY_THE_NODE)
    if ranks_per_node % inner:
        given = [f"parallel.{axis}={sizes[axis]}" for axis in _BY_THE_NODE if sizes[axis] > 1]
        last = _BY_THE_NODE[0] if sizes[_BY_THE_NODE[0]] > 1 else _BY_THE_NODE[1]
        others = inner // sizes[last]
        fitting = [n for n in divisors(ranks_per_node) if ranks_per_node % (n * others) == 0]
        use = f"parallel.{last}={' or '.join(map(str, fitting))}" if fitting else f"smaller {last} and tp"
        errors.append(
            f"{' x '.join(given)}: a group must lie inside a node, and {inner} ranks do not divide the "
            f"{ranks_per_node} of one (launch.nproc); use {use}, and parallel.cp for a sequence over nodes"
        )
    return errors


def placement_warnings(sizes: Mapping[str, int], ranks_per_node: int) -> list[str]:
    """What is slower than it need be: groups that cross nodes from one rail to another, one line an axis."""
    places = [place(axis, sizes, ranks_per_node) for axis in AXES]
    return [
        f"parallel.{found.axis}={sizes[found.axis]}: its groups have other GPUs on one node than on "
        "another, so what they send changes rails; sizes that fill whole nodes, or divide one, avoid it"
        for found in places
        if found.nodes > 1 and not found.keeps_rails
    ]


def _by_node(group: range, ranks_per_node: int) -> dict[int, list[int]]:
    """The GPUs that a group has on each of its nodes."""
    found: dict[int, list[int]] = {}
    for rank in group:
        node, gpu = divmod(rank, ranks_per_node)
        found.setdefault(node, []).append(gpu)
    return found
