"""From measurements to the nodes that are to blame. Pure.

A speed is held against what the cluster's profile expects, or else against the median of its like. If
most are below what is expected, then it is the expectation, or the cluster, and no one node: that is
said, and the median counts. Medians are the upper of two: of two nodes the faster one is the measure.
"""

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Place:
    """Where a rank computes: its node, and its device there.

    id: where the device sits, or what it is called for good; "" if not known.
    """

    node: str
    device: int
    kind: str = "GPU"
    id: str = ""


@dataclass(frozen=True)
class Sample:
    """One measured speed. what: alike are compared. right: whether data came out, or arrived, as known.

    wrong: whose data was not, where that can be told: (receiver, sender) as numbers of `places`.
    """

    what: str
    unit: str
    value: float
    places: tuple[Place, ...]
    right: bool = True
    wrong: tuple[tuple[int, int], ...] = ()

    @property
    def nodes(self) -> list[str]:
        return list(dict.fromkeys(place.node for place in self.places))


@dataclass
class Verdict:
    """bad: nodes to leave out, with the reasons. warnings: what blames no node.

    unclear: wrong data for which no node can be blamed, so that a run would be wrong whatever is left out.
    """

    bad: dict[str, list[str]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    unclear: list[str] = field(default_factory=list)

    def blame(self, node: str, reason: str) -> None:
        reasons = self.bad.setdefault(node, [])
        if reason not in reasons:
            reasons.append(reason)

    def add(self, other: "Verdict") -> None:
        for node, reasons in other.bad.items():
            for reason in reasons:
                self.blame(node, reason)
        self.warnings += other.warnings
        self.unclear += other.unclear

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
            wrong.blame(node, f"{name_devices(sample.places)}: {sample.what}: wrong data")
        if sample.value < fraction * measure.value:
            slow.blame(node, f"{name_devices(sample.places)}: {_speed(sample, measure)}")
    return wrong, slow


def judge_pairs(samples: Sequence[Sample], expected: float, fraction: float) -> tuple[Verdict, Verdict]:
    """Like samples between devices of two nodes, each device in one or two pairs: (wrong data, slow).

    A pair says nothing of which end is to blame, so a device is judged by the best of its pairs; for wrong
    data of one that is well in its others, both ends are. Those of two nodes have but one: neither is.
    """
    wrong, slow = Verdict(), Verdict()
    if not samples:
        return wrong, slow
    best = best_of_pairs(samples)
    measure = measure_for(best, expected, fraction)
    slow.warnings += [measure.warning] if measure.warning else []
    for sample in best:
        if sample.value < fraction * measure.value:
            slow.blame(sample.nodes[0], f"{name_devices(sample.places)}: {_speed(sample, measure)}")
    sound = {_device(place) for pair in samples if pair.right for place in pair.places}
    unsound = [place for pair in samples for place in pair.places if _device(place) not in sound]
    explained = {place.node for place in unsound}
    for pair in samples:
        if not pair.right and not explained & set(pair.nodes):
            unsound += pair.places
    for place in unsound:
        wrong.blame(place.node, f"{name_devices([place])}: {samples[0].what}: wrong data")
    if len({node for pair in samples for node in pair.nodes}) == 2:
        return Verdict(unclear=wrong.as_warnings().warnings), slow.as_warnings()
    return wrong, slow


def best_of_pairs(samples: Sequence[Sample]) -> list[Sample]:
    """For each device the best of its pairs: a sample of the device alone."""
    best: dict[tuple[str, int], Sample] = {}
    for pair in samples:
        for place in pair.places:
            known = best.get(_device(place))
            if known is None or pair.value > known.value:
                best[_device(place)] = replace(pair, places=(place,))
    return list(best.values())


def _device(place: Place) -> tuple[str, int]:
    return place.node, place.device


def judge_spanning(
    samples: Sequence[Sample], pairs: Sequence[Sample], expected: float, fraction: float
) -> tuple[Verdict, Verdict]:
    """Like samples of groups over several nodes whose pairs were judged well: (wrong data, slow).

    Nothing tells which node of a slow group it is, so none is left out for it; the one whose pair was the
    slowest is named. Wrong data blames the nodes that explain it, if only some can.
    """
    wrong, slow = Verdict(), Verdict()
    if not samples:
        return wrong, slow
    measure = measure_for(samples, expected, fraction)
    slow.warnings += [measure.warning] if measure.warning else []
    speeds: dict[str, float] = {}
    for sample in best_of_pairs(pairs):
        node = sample.nodes[0]
        speeds[node] = min(sample.value, speeds.get(node, sample.value))
    for sample in samples:
        what = f"{sample.what} over {_nodes(sample.nodes)}: wrong data"
        guilty = _guilty(sample)
        for node, places in guilty.items():
            wrong.blame(node, f"{name_devices(places)}: {what}")
        if not sample.right and not guilty:
            wrong.unclear.append(what)
        if sample.value < fraction * measure.value:
            known = [node for node in sample.nodes if node in speeds]
            hint = f"; the slowest pair of them is that of {min(known, key=speeds.__getitem__)}" * bool(known)
            slow.warnings.append(f"{_nodes(sample.nodes)}: {_speed(sample, measure)}{hint}")
    return wrong, slow


def _guilty(sample: Sample) -> dict[str, list[Place]]:
    """The nodes that explain what was wrong, with their devices in it; none if it may as well be others.

    That is a sender whom most other nodes find wrong, and a receiver who finds most others wrong, unless
    there is one of each; of what most others received well, the receiver.
    """
    ends = [(sample.places[receiver], sample.places[sender]) for receiver, sender in sample.wrong]
    left, others = {(receiver.node, sender.node) for receiver, sender in ends}, len(sample.nodes) - 1
    found = {receiver for receiver, sender in left if receiver == sender}
    while left := {pair for pair in left if not found & {*pair}}:
        sent, received = Counter(sender for _, sender in left), Counter(receiver for receiver, _ in left)
        most = max(*sent.values(), *received.values())
        senders = {node for node, count in sent.items() if count == most}
        receivers = {node for node, count in received.items() if count == most}
        if 2 * most == others or (2 * most > others and senders and receivers and senders != receivers):
            return {}
        found |= senders | receivers if 2 * most > others else set(received)
    if 2 * len(found) > len(sample.nodes):
        return {}
    places = dict.fromkeys(place for pair in ends for place in pair)
    return {node: [place for place in places if place.node == node] for node in sorted(found)}


def _speed(sample: Sample, measure: Measure) -> str:
    return f"{sample.what} {sample.value:.4g} {sample.unit}, {measure.text(sample.value)}"


def name_devices(places: Iterable[Place]) -> str:
    """Such as GPU 5 (0000:9a:00), or GPUs 0-7."""
    all_places = list(places)
    devices = sorted(place.device for place in all_places)
    kind, name = all_places[0].kind, all_places[0].id
    if len(devices) == 1:
        return f"{kind} {devices[0]}" + (f" ({name})" if name else "")
    if devices == list(range(devices[0], devices[-1] + 1)):
        return f"{kind}s {devices[0]}-{devices[-1]}"
    return f"{kind}s {', '.join(map(str, devices))}"


def _nodes(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
