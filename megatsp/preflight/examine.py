"""Measures the nodes of an allocation, judges them and chooses those that a run is to have.

In this order, so that each step finds only what those before it could not: every device's free memory and
product, and the transfers within nodes; hops between neighbouring nodes, spares included; then the transfers
between the chosen nodes, in the groups of the mesh. All ranks gather all samples and come to the same choice.
What they tell each other goes over gloo, and so not over the devices and networks that are measured.
"""

import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatsp.cluster.profiles import Expected
from megatsp.comm import Comm
from megatsp.preflight.decide import Choice, choose
from megatsp.preflight.guard import Guard, first_line
from megatsp.preflight.judge import (
    Place,
    Sample,
    Verdict,
    judge_nodes,
    judge_pairs,
    judge_spanning,
    name_devices,
)
from megatsp.preflight.measure import (
    Bench,
    Measured,
    measure_product,
    measure_transfer,
    product_shape,
    ring_rounds,
)
from megatsp.preflight.transfers import Transfer, groups, transfers
from megatsp.schema import Config

_MOST_HOP_BYTES = 2**28
_LEAST_HOP_BYTES = {"cuda": 2**24, "cpu": 2**10}
_BRIEF_S = 200e-6  # such a transfer's time is that of its start, which varies
_MEMORY = "free memory"
_FREE = 0.9  # of the median: less means that somebody else holds a GPU's memory


@dataclass(frozen=True)
class Judging:
    """fraction: of the expected or median speed, below which one is slow. excluding: slow nodes are left out.

    timeout_s: of a collective. limit_s: of a measurement, which is sooner. folder: of a job's attempt.
    """

    expected: Expected
    fraction: float
    excluding: bool
    timeout_s: float
    limit_s: float
    folder: Path | None = None


@dataclass(frozen=True)
class Kind:
    """Like samples. where: devices, within nodes, node to node, or between nodes. bytes: of the whole.

    seconds: of one transfer, as most ranks saw it; 0 of what is none.
    """

    what: str
    where: str
    bytes: int
    expected: float
    samples: list[Sample]
    seconds: float = 0.0


@dataclass
class Found:
    """What was measured and what follows. choice: None if too few nodes are good."""

    names: list[str]
    needed: int
    kinds: list[Kind] = field(default_factory=list)
    verdict: Verdict = field(default_factory=Verdict)
    choice: Choice | None = None


def examine(
    config: Config,
    places: Sequence[Place],
    needed: int,
    bench: Bench,
    judging: Judging,
    unfit: Mapping[str, Sequence[str]] | None = None,
) -> Found:
    """On all ranks of the default process group, of gloo, which return the same.

    Args:
        config: validated for the ranks of `needed` nodes.
        places: of all ranks, in their order, node by node and as many on each.
        unfit: nodes that cannot be measured, with the reasons.
    """
    names = list(dict.fromkeys(place.node for place in places))
    found = Found(names, needed)
    found.verdict.add(Verdict({node: list(reasons) for node, reasons in (unfit or {}).items()}))
    examination = _Examination(config, places, names, bench, judging, found.verdict)
    per_node = len(places) // len(names)
    within, between = _split(config, per_node)

    def add(measure: Callable[[], Kind], judge: Callable[[Kind], tuple[Verdict, Verdict]]) -> Kind:
        """Measures; what is slow a second time, for a stranger's burst of traffic blames no node."""
        kind = measure()
        if judge(kind)[1] != Verdict():
            kind = _better(kind, measure())
        if kind.samples:
            found.kinds.append(kind)
            found.verdict.add(examination.keep(kind, judge(kind)))
        return kind

    def choice() -> Choice | None:
        return None if found.verdict.unclear else choose(names, found.verdict.bad, needed)

    def by_node(kind: Kind, fraction: float = judging.fraction) -> tuple[Verdict, Verdict]:
        return judge_nodes(kind.samples, kind.expected, fraction)

    if bench.device.type == "cuda":
        add(examination.free_memory, partial(by_node, fraction=_FREE))
    add(examination.products, by_node)
    for transfer in within:
        in_one = [group for group in groups(transfer.axes, config.parallel) if group[-1] < per_node]
        all_groups = [[start + rank for rank in group] for start in examination.starts() for group in in_one]
        add(partial(examination.transfer, transfer, all_groups, "within nodes"), by_node)
    hops: list[Sample] = []
    if between:
        num_bytes = max(transfer.bytes for transfer in between)
        hops = add(
            partial(examination.hops, num_bytes),
            lambda kind: judge_pairs(kind.samples, kind.expected, judging.fraction),
        ).samples
    found.choice = choice()
    for _ in range(2):  # once more, if it shows that other nodes are to be taken
        chosen = found.choice
        if chosen is None:
            break
        first = [names.index(name) * per_node for name in chosen.chosen]
        for transfer in between:
            all_groups = [
                [first[rank // per_node] + rank % per_node for rank in group]
                for group in groups(transfer.axes, config.parallel)
            ]
            add(
                partial(examination.transfer, transfer, all_groups, "between nodes"),
                lambda kind: judge_spanning(kind.samples, hops, kind.expected, judging.fraction),
            )
        found.choice = choice()
        if found.choice is None or found.choice.chosen == chosen.chosen:
            break
    return found


def _better(one: Kind, other: Kind) -> Kind:
    """The same measured twice: of each speed the better one, but data must have been right both times."""
    again = {sample.places: sample for sample in other.samples}
    samples = [
        replace(
            a,
            value=max(a.value, again[a.places].value),
            right=a.right and again[a.places].right,
            wrong=tuple(dict.fromkeys((*a.wrong, *again[a.places].wrong))),
        )
        for a in one.samples
        if a.places in again
    ]
    return replace(one, samples=samples)


def _split(config: Config, per_node: int) -> tuple[list[Transfer], list[Transfer]]:
    """The run's transfers: those of which every group lies in one node, and the others."""
    within: list[Transfer] = []
    between: list[Transfer] = []
    for transfer in transfers(config):
        all_groups = groups(transfer.axes, config.parallel)
        inside = all(group[0] // per_node == group[-1] // per_node for group in all_groups)
        (within if inside else between).append(transfer)
    return within, between


def hop_bytes(largest: int, device: torch.device) -> int:
    """Size of a hop between nodes, of which the run's largest transfer has so many bytes."""
    return min(max(largest, _LEAST_HOP_BYTES[device.type]), _MOST_HOP_BYTES)


def expected_gb_s(expected: Expected, transfer: Transfer, places: Sequence[Place], per_node: int) -> float:
    """The profile's figure, where it is one of such a transfer in such a group; else 0, not known.

    places: of a group's ranks. per_node: ranks of a node.
    """
    nodes = len({place.node for place in places})
    if nodes == len(places):
        return expected.between_nodes_gb_s
    is_whole_node = nodes == 1 and len(places) == per_node == (expected.ranks_per_node or per_node)
    is_gather = transfer.operation in ("all_gather", "reduce_scatter")
    return expected.within_node_gb_s if is_whole_node and is_gather else 0.0


class _Examination:
    """The measurements, each made on all ranks and gathered to all; those of bad nodes measure nothing.

    verdict: whose bad nodes they are. A device that raises is added to it.
    """

    def __init__(
        self,
        config: Config,
        places: Sequence[Place],
        names: Sequence[str],
        bench: Bench,
        judging: Judging,
        verdict: Verdict,
    ) -> None:
        self._config, self._places, self._names = config, places, names
        self._bench, self._judging, self._verdict = bench, judging, verdict
        self._out = set(verdict.bad)
        self._rank, self._per_node = dist.get_rank(), len(places) // len(names)
        self._guard = Guard(places, judging.limit_s, judging.folder)
        self._made: dict[tuple[int, ...], Comm | None] = {}

    def starts(self) -> list[int]:
        """The first ranks of the nodes that take part."""
        return [i * self._per_node for i, name in enumerate(self._names) if name not in self._out]

    def keep(self, kind: Kind, verdicts: tuple[Verdict, Verdict]) -> Verdict:
        """Of (wrong data, slow) what is acted upon: slow nodes stay where only warnings are wanted."""
        wrong, slow = verdicts
        acts = self._judging.excluding and not 0 < kind.seconds < _BRIEF_S
        wrong.add(slow if acts else slow.as_warnings())
        return wrong

    def free_memory(self) -> Kind:
        """What every GPU has left for the run."""

        def measure() -> Measured:
            torch.cuda.empty_cache()
            return Measured(torch.cuda.mem_get_info()[0] / 2**30, True)

        return self._alone(_MEMORY, "GiB", 0.0, measure)

    def products(self) -> Kind:
        """A product on every device."""
        rows, h, ffn = product_shape(self._config, self._bench.device)
        dtype = self._config.trainer.dtype
        what = f"GEMM {dtype} [{rows} x {h}] [{h} x {ffn}]"
        self._say(what)
        expected = self._judging.expected.gemm_tflops if dtype == "bf16" else 0.0
        return self._alone(what, "TFLOP/s", expected, lambda: measure_product(self._config, self._bench))

    def _alone(self, what: str, unit: str, expected: float, measure: Callable[[], Measured]) -> Kind:
        """A measurement of each device alone. One that raises puts its node out of all that follows."""
        own: Measured | str | None = None
        if self._places[self._rank].node not in self._out:
            with self._guard.over(what):
                try:
                    own = measure()
                except Exception as error:  # whatever it is, the others must hear of it
                    own = first_line(error)
        samples = []
        for place, result in zip(self._places, self._gather(own), strict=True):
            if isinstance(result, str):
                self._verdict.blame(place.node, f"{name_devices([place])}: {what}: {result}")
                self._out.add(place.node)
            elif result is not None:
                samples.append(Sample(what, unit, result.value, (place,), result.right))
        return Kind(what, "devices", 0, expected, samples)

    def transfer(self, transfer: Transfer, all_groups: Sequence[Sequence[int]], where: str) -> Kind:
        """One transfer, in all of these groups at once; the slowest of its ranks is a group's speed."""
        over = " x ".join(a for a in transfer.axes if getattr(self._config.parallel, a) > 1)
        size = len(all_groups[0]) if all_groups else 0
        what = f"{transfer.what}, {transfer.operation} over {over} = {size}"
        return self._kind(transfer, what, where, [all_groups])

    def hops(self, num_bytes: int) -> Kind:
        """Each device with its like on the next node of the ring, both ways at once."""
        num_bytes = hop_bytes(num_bytes, self._bench.device)
        starts, devices = self.starts(), range(self._per_node)
        rounds = [
            [sorted((starts[a] + device, starts[b] + device)) for a, b in pairs for device in devices]
            for pairs in ring_rounds(len(starts))
        ]
        hop = Transfer("hop to the next node", (), "shift", num_bytes // 2, "bf16")
        return self._kind(hop, hop.what, "node to node", rounds)

    def _kind(
        self, transfer: Transfer, what: str, where: str, rounds: Sequence[Sequence[Sequence[int]]]
    ) -> Kind:
        """A transfer in the groups of each round, one round after the other."""
        self._say(f"{what}, {transfer.bytes / 2**20:.4g} MiB, {where}")
        samples, seconds, expected = [], [], 0.0
        for all_groups in rounds:
            dist.barrier()
            results = self._gather(self._measure(transfer, what, all_groups))
            for group in all_groups:
                measured: list[Measured] = [results[rank] for rank in group]
                value, right = min(m.value for m in measured), all(m.right for m in measured)
                wrong = tuple((i, sender) for i, m in enumerate(measured) for sender in m.wrong_of)
                places = tuple(self._places[rank] for rank in group)
                samples.append(Sample(what, "GB/s", value, places, right, wrong))
                seconds += [m.seconds for m in measured]
                expected = expected_gb_s(self._judging.expected, transfer, places, self._per_node)
        typical_s = statistics.median(seconds) if seconds else 0.0
        return Kind(what, where, transfer.bytes, expected, samples, typical_s)

    def _measure(self, transfer: Transfer, what: str, all_groups: Sequence[Sequence[int]]) -> Measured | None:
        """This rank's part; None if it is in none of the groups."""
        group: Sequence[int] = next((group for group in all_groups if self._rank in group), ())
        with self._guard.over(what, [rank for rank in group if rank != self._rank]):
            self._make(all_groups)
            comm = self._made[tuple(group)] if group else None
            return None if comm is None else measure_transfer(transfer, comm, self._bench)

    def _make(self, all_groups: Sequence[Sequence[int]]) -> None:
        """The process groups that are not there yet; on all ranks, which number them alike.

        On GPUs they are NCCL's, with barriers of gloo. Nothing is split off a group of all ranks, for that
        would need the devices of bad nodes.
        """
        backend = "cpu:gloo,cuda:nccl" if self._bench.device.type == "cuda" else "gloo"
        timeout = timedelta(seconds=self._judging.timeout_s)
        for group in map(tuple, all_groups):
            if group not in self._made:
                made = dist.new_group(list(group), timeout, backend)
                self._made[group] = Comm(made) if self._rank in group else None

    def _gather(self, own: Any) -> list[Any]:
        results: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(results, own)
        return results

    def _say(self, text: str) -> None:
        """What begins, so that it is known where a transfer that never ends was."""
        if self._rank == 0:
            print(f"preflight: {text} ...", file=sys.stderr, flush=True)
