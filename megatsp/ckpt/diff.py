"""`megatsp ckpt diff`: in what two checkpoints differ, whatever the mesh of each."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatsp.checkpoint.state import read_state
from megatsp.ckpt.listing import read_config
from megatsp.ckpt.tensors import StoredTensors

_AT_ONCE = 1 << 22  # numbers, so that no copy of a large tensor is made
_INTEGERS = {2: torch.int16, 4: torch.int32}


@dataclass(frozen=True)
class Values:
    """How far the numbers of one tensor are apart; relative: to the largest of the first's."""

    name: str
    different: int
    elements: int
    max_abs: float
    relative: float


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of every key of nested mappings."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from leaves(value, f"{path}.{key}" if path else key)
    else:
        yield path, node


def changed(before: Any, after: Any) -> Iterator[str]:
    """Leaves that differ: "path: this there, that here"."""
    one, other = dict(leaves(before)), dict(leaves(after))
    for key in sorted(one.keys() | other.keys()):
        if one.get(key) != other.get(key):
            yield f"{key}: {json.dumps(one.get(key))} -> {json.dumps(other.get(key))}"


def diff(one: Path, other: Path, settings: bool = True) -> tuple[dict[str, Any], bool]:
    """(what differs, whether nothing does), holding one tensor of each at a time.

    settings: whether those of config.yaml count.

    Raises:
        Damaged: one of them is, as far as sizes and headers tell.
    """
    before, after = StoredTensors(one), StoredTensors(other)
    left, right = before.manifest.tensors, after.manifest.tensors
    found: dict[str, Any] = {
        "state": list(changed(asdict(read_state(one)), asdict(read_state(other)))),
        "settings": list(changed(asdict(read_config(one)), asdict(read_config(other)))) if settings else [],
        "only_in_first": sorted(left.keys() - right.keys()),
        "only_in_second": sorted(right.keys() - left.keys()),
        "shapes": [
            f"{name}: {left[name].dtype} {left[name].shape} -> {right[name].dtype} {right[name].shape}"
            for name in sorted(left.keys() & right.keys())
            if left[name] != right[name]
        ],
    }
    values, equal = [], 0
    for name in left:
        if left[name] != right.get(name):
            continue
        values_of = compare(name, before.read(name), after.read(name))
        before.release(name)
        after.release(name)
        if values_of.different:
            values.append(asdict(values_of))
        else:
            equal += 1
    is_equal = not values and not any(found.values())
    return found | {"values": values, "equal_tensors": equal}, is_equal


def compare(name: str, one: Tensor, other: Tensor) -> Values:
    """Bits decide what is different: NaN equals the same NaN, and 0 is not -0."""
    different, apart, largest = 0, 0.0, 0.0
    for mine, theirs in zip(_pieces(one), _pieces(other), strict=True):
        kind = _INTEGERS[mine.element_size()]
        if count := int((mine.view(kind) != theirs.view(kind)).sum()):
            different += count
            apart = _larger(apart, (mine.double() - theirs.double()).abs().max().item())
        largest = _larger(largest, mine.abs().max().item())
    relative = apart / largest if largest else float("inf")
    return Values(name, different, one.numel(), apart, relative if different else 0.0)


def _pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    return tensor.contiguous().view(-1).split(_AT_ONCE)


def _larger(one: float, other: float) -> float:
    """The larger of two; NaN if one is."""
    return one if one > other or one != one else other


def diff_lines(found: dict[str, Any], most: int = 20) -> Iterator[str]:
    """`diff`'s for reading, the largest relative difference first; most: of values."""
    titles = {
        "state": "state", "settings": "settings", "only_in_first": "only in the first",
        "only_in_second": "only in the second", "shapes": "shapes",
    }  # fmt: skip
    for key, title in titles.items():
        if found[key]:
            yield f"{title}:"
            yield from (f"  {line}" for line in found[key])
    values = sorted(found["values"], key=lambda value: -value["relative"])
    if values:
        yield f"values: {len(values)} tensors differ"
        yield f"  {'max abs':>10}  {'relative':>10}  {'numbers':>12}"
    for value in values[:most]:
        numbers = f"{value['different']:,}"
        yield f"  {value['max_abs']:>10.3g}  {value['relative']:>10.3g}  {numbers:>12}  {value['name']}"
    if len(values) > most:
        yield f"  and {len(values) - most} more (--json has all)"
    yield f"{found['equal_tensors']} tensors are equal to the bit"
