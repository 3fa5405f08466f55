"""Slurm's notation of several nodes, such as n[1-3,07],gpu-a[001-128]."""

import re
from collections.abc import Iterator


def expand(text: str) -> list[str]:
    """The names that a list in Slurm's notation stands for, in its order.

    Raises:
        ValueError: a bracket is not closed, or a range runs backwards.
    """
    names: list[str] = []
    for item in re.findall(r"(?:\[[^\]]*\]|[^,])+", text.strip()):
        names += _expand_one(item)
    return names


def _expand_one(item: str) -> Iterator[str]:
    before, bracket, rest = item.partition("[")
    if not bracket:
        yield item
        return
    ranges, closed, after = rest.partition("]")
    if not closed:
        raise ValueError(f"{item}: a [ without its ] in a list of nodes; write such as n[1-3,07]")
    for part in ranges.split(","):
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if not found or int(found[2] or found[1]) < int(found[1]):
            raise ValueError(f"{item}: {part!r} is no range of nodes; write such as n[1-3,07]")
        for number in range(int(found[1]), int(found[2] or found[1]) + 1):
            for end in _expand_one(after):
                yield f"{before}{number:0{len(found[1])}d}{end}"
