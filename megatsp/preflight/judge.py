"""From measurements to the nodes that are to blame. Pure.

A speed is held against what the cluster's profile expects, or else against the median of its like. If
most are below what is expected, then it is the expectation, or the cluster, and no one node: that is
said, and the median counts. Medians are the upper of two: of two nodes the faster one is the measure.
"""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Place:
    """Where a rank computes: its node, and its device there."""

    node: str
    device: int
    kind: str = "GPU"


@dataclass(frozen=True)
class Sample:
    """One measured speed. what: alike are compared. right: whether data came out, or arrived, as known."""

    what: str
    unit: str
    value: float
    places: tuple[Place, ...]
    right: bool = True

    @property
    def nodes(self) -> list[str]:
        return list(dict.fromkeys(place.node for place in self.places))


@dataclass
class Verdict:
    """bad: nodes to leave out, with the reasons. warnings: what blames no node."""

    bad: dict[str, list[str]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def blame(self, node: str, reason: str) -> None:
        reasons = self.bad.setdefault(node, [])
        if reason not in reasons:
            reasons.append(reason)

    def add(self, other: "Verdict") -> None:
        for node, reasons in other.bad.items():
            for reason in reasons:
                self.blame(node, reason)
        self.warnings += other.warnings

    def as_warnings(self) -> "Verdict":
        """The same, blaming nobody."""
        lines = [f"{node}, {reason}" for node, reasons in self.bad.items() for reason in reasons]
        return Verdict({}, [*lines, *self.warnings])


@dataclass(frozen=True)
class Measure:
    """What a kind of samples is held against. warning: that they are below what was expected, or ""."""

    value: float
    name: str
    warning: str = ""

    def text(self, value: float) -> str:
        return f"{value / self.value:.2f} of the {self.name} {self.value:.4g}" if self.value else ""


def measure_for(samples: Sequence[Sample], expected: float, fraction: float) -> Measure:
    """The reference of like samples. expected: 0 if not known."""
    median = statistics.median_high(sample.value for sample in samples)
    if not expected:
        return Measure(median, "median")
    if median >= fraction * expected:
        return Measure(expected, "expected")
    first = samples[0]
    return Measure(
        median, "median",
        f"{first.what}: most are below what is expected: the median is {median:.4g} {first.unit}, "
        f"{median / expected:.2f} of {expected:.4g}; either the profile or the cluster is wrong",
    )  # fmt: skip


def judge_nodes(samples: Sequence[Sample], expected: float, fraction: float) -> tuple[Verdict, Verdict]:
    """Like samples, each within one node: (who gave wrong data, who is slow)."""
    wrong, slow = Verdict(), Verdict()
    if not samples:
        return wrong, slow
    measure = measure_for(samples, expected, fraction)
    slow.warnings += [measure.warning] if measure.warning else []
    for sample in samples:
        (node,) = sample.nodes
        if not sample.right:
            wrong.blame(node, f"{_devices(sample.places)}: {sample.what}: wrong data")
        if sample.value < fraction * measure.value:
            slow.blame(node, f"{_devices(sample.places)}: {_speed(sample, measure)}")
    return wrong, slow


def judge_pairs(samples: Sequence[Sample], expected: float, fraction: float) -> tuple[Verdict, Verdict]:
    """Like samples between two nodes each, every node in one or two pairs: (wrong data, slow).

    A pair says nothing of which end is to blame, so a node is judged by the best of its pairs. Two nodes
    have but one: a slow one is then told only against what is expected.
    """
    wrong, slow = Verdict(), Verdict()
    if not samples:
        return wrong, slow
    best = best_of_pairs(samples)
    measure = measure_for(best, expected, fraction)
    slow.warnings += [measure.warning] if measure.warning else []
    for sample in best:
        if sample.value < fraction * measure.value:
            slow.blame(sample.nodes[0], f"{_devices(sample.places)}: {_speed(sample, measure)}")
    pairs = _pairs(samples)
    sound = {node for pair in pairs if pair.right for node in pair.nodes}
    for pair in pairs:
        for place in pair.places:
            if place.node not in sound:
                wrong.blame(place.node, f"{_devices([place])}: {pair.what}: wrong data")
    return wrong, slow


def best_of_pairs(samples: Sequence[Sample]) -> list[Sample]:
    """For each node the best of its pairs: a sample of the node alone."""
    best: dict[str, Sample] = {}
    for pair in _pairs(samples):
        for node in pair.nodes:
            if node not in best or pair.value > best[node].value:
                best[node] = pair
    return [
        replace(pair, places=tuple(place for place in pair.places if place.node == node))
        for node, pair in best.items()
    ]


def _pairs(samples: Sequence[Sample]) -> list[Sample]:
    """One sample for each two nodes: of their devices the slowest, or one whose data was wrong."""
    found: dict[tuple[str, ...], Sample] = {}
    for sample in samples:
        worst = found.setdefault(tuple(sample.nodes), sample)
        if (sample.right, sample.value) < (worst.right, worst.value):
            found[tuple(sample.nodes)] = sample
    return list(found.values())


def judge_spanning(
    samples: Sequence[Sample], pairs: Sequence[Sample], expected: float, fraction: float
) -> tuple[Verdict, Verdict]:
    """Like samples of groups over several nodes whose pairs were judged well: (wrong data, slow).

    Nothing tells which node of a slow group it is, so none is left out for it; the one whose pair was the
    slowest is named. Wrong data blames all of its nodes: a run would be wrong too.
    """
    wrong, slow = Verdict(), Verdict()
    if not samples:
        return wrong, slow
    measure = measure_for(samples, expected, fraction)
    slow.warnings += [measure.warning] if measure.warning else []
    speeds = {sample.nodes[0]: sample.value for sample in best_of_pairs(pairs)}
    for sample in samples:
        if not sample.right:
            for node in sample.nodes:
                wrong.blame(node, f"{sample.what} over {_nodes(sample.nodes)}: wrong data")
        if sample.value < fraction * measure.value:
            known = [node for node in sample.nodes if node in speeds]
            hint = f"; the slowest pair of them is that of {min(known, key=speeds.__getitem__)}" * bool(known)
            slow.warnings.append(f"{_nodes(sample.nodes)}: {_speed(sample, measure)}{hint}")
    return wrong, slow


def _speed(sample: Sample, measure: Measure) -> str:
    return f"{sample.what} {sample.value:.4g} {sample.unit}, {measure.text(sample.value)}"


def _devices(places: Iterable[Place]) -> str:
    """Such as GPU 5, or GPUs 0-7."""
    all_places = list(places)
    devices = sorted(place.device for place in all_places)
    kind = all_places[0].kind
    if len(devices) == 1:
        return f"{kind} {devices[0]}"
    if devices == list(range(devices[0], devices[-1] + 1)):
        return f"{kind}s {devices[0]}-{devices[-1]}"
    return f"{kind}s {', '.join(map(str, devices))}"


def _nodes(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
