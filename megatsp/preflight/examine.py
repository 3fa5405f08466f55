"""Measures the nodes of an allocation, judges them and chooses those that a run is to have.

In this order, so that each step finds only what those before it could not: every device's product and the
transfers within nodes; hops between neighbouring nodes, spares included; then the transfers between
the chosen nodes, in the groups of the mesh. All ranks gather all samples and come to the same choice.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from megatsp.cluster.profiles import Expected
from megatsp.comm import Comm
from megatsp.preflight.decide import Choice, choose
from megatsp.preflight.judge import Place, Sample, Verdict, judge_nodes, judge_pairs, judge_spanning
from megatsp.preflight.measure import (
    Bench,
    measure_pair,
    measure_product,
    measure_transfer,
    product_shape,
    ring_rounds,
)
from megatsp.preflight.transfers import Transfer, groups, transfers
from megatsp.schema import Config

_MOST_PAIR_BYTES = 2**28
_LEAST_PAIR_BYTES = 2**10
_MEMORY = "free memory"
_FREE = 0.9  # of the median: less means that somebody else holds a GPU's memory


@dataclass(frozen=True)
class Judging:
    """fraction: of the expected or median speed, below which one is slow. excluding: slow nodes are left out.

    timeout_s: of a collective.
    """

    expected: Expected
    fraction: float
    excluding: bool
    timeout_s: float


@dataclass(frozen=True)
class Kind:
    """Like samples. where: devices, within nodes, node to node, or between nodes. bytes: of the whole."""

    what: str
    where: str
    bytes: int
    expected: float
    samples: list[Sample]


@dataclass
class Found:
    """What was measured and what follows. choice: None if too few nodes are good."""

    names: list[str]
    needed: int
    kinds: list[Kind] = field(default_factory=list)
    verdict: Verdict = field(default_factory=Verdict)
    choice: Choice | None = None


def examine(config: Config, places: Sequence[Place], needed: int, bench: Bench, judging: Judging) -> Found:
    """On all ranks of the default process group, which return the same.

    Args:
        config: validated for the ranks of `needed` nodes.
        places: of all ranks, in their order, node by node and as many on each.
    """
    names = list(dict.fromkeys(place.node for place in places))
    examination = _Examination(config, places, names, bench, judging)
    found = Found(names, needed)
    per_node = len(places) // len(names)
    within, between = _split(config, per_node)

    def add(measure: Callable[[], Kind], judge: Callable[[Kind], tuple[Verdict, Verdict]]) -> Kind:
        """Measures; what is slow a second time, for a stranger's burst of traffic blames no node."""
        kind = measure()
        if judge(kind)[1] != Verdict():
            kind = _better(kind, measure())
        found.kinds.append(kind)
        found.verdict.add(examination.keep(judge(kind)))
        return kind

    def by_node(kind: Kind, fraction: float = judging.fraction) -> tuple[Verdict, Verdict]:
        return judge_nodes(kind.samples, kind.expected, fraction)

    add(examination.products, by_node)
    if bench.device.type == "cuda":
        add(examination.free_memory, partial(by_node, fraction=_FREE))
    for transfer in within:
        in_one = [group for group in groups(transfer.axes, config.parallel) if group[-1] < per_node]
        starts = range(0, len(places), per_node)
        all_groups = [[start + rank for rank in group] for start in starts for group in in_one]
        add(partial(examination.transfer, transfer, all_groups, "within nodes"), by_node)
    hops: list[Sample] = []
    if len(names) > 1:
        num_bytes = max((transfer.bytes for transfer in between), default=0)
        hops = add(
            partial(examination.pairs, num_bytes),
            lambda kind: judge_pairs(kind.samples, kind.expected, judging.fraction),
        ).samples
    found.choice = choose(names, found.verdict.bad, needed)
    if found.choice is None:
        return found
    first = [names.index(name) * per_node for name in found.choice.chosen]
    for transfer in between:
        all_groups = [
            [first[rank // per_node] + rank % per_node for rank in group]
            for group in groups(transfer.axes, config.parallel)
        ]
        add(
            partial(examination.transfer, transfer, all_groups, "between nodes"),
            lambda kind: judge_spanning(kind.samples, hops, kind.expected, judging.fraction),
        )
    found.choice = choose(names, found.verdict.bad, needed)
    return found


def _better(one: Kind, other: Kind) -> Kind:
    """The same measured twice: of each speed the better one, but data must have been right both times."""
    samples = [
        replace(a, value=max(a.value, b.value), right=a.right and b.right)
        for a, b in zip(one.samples, other.samples, strict=True)
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


class _Examination:
    """The measurements, each made on all ranks and gathered to all."""

    def __init__(
        self, config: Config, places: Sequence[Place], names: Sequence[str], bench: Bench, judging: Judging
    ) -> None:
        self._config, self._places, self._names = config, places, names
        self._bench, self._judging = bench, judging
        self._rank = dist.get_rank()
        self._made: dict[tuple[tuple[int, ...], ...], Comm | None] = {}

    def keep(self, verdicts: tuple[Verdict, Verdict]) -> Verdict:
        """Of (wrong data, slow) what is acted upon: slow nodes stay where only warnings are wanted."""
        wrong, slow = verdicts
        wrong.add(slow if self._judging.excluding else slow.as_warnings())
        return wrong

    def products(self) -> Kind:
        """A product on every device."""
        rows, h, ffn = product_shape(self._config, self._bench.device)
        dtype = self._config.trainer.dtype
        what = f"GEMM {dtype} [{rows} x {h}] [{h} x {ffn}]"
        self._say(what)
        expected = self._judging.expected.gemm_tflops if dtype == "bf16" else 0.0
        return self._alone(what, "TFLOP/s", expected, measure_product(self._config, self._bench))

    def free_memory(self) -> Kind:
        """What every GPU has left for the run."""
        torch.cuda.empty_cache()
        return self._alone(_MEMORY, "GiB", 0.0, (torch.cuda.mem_get_info()[0] / 2**30, True))

    def _alone(self, what: str, unit: str, expected: float, own: tuple[float, bool]) -> Kind:
        results = zip(self._places, self._gather(own), strict=True)
        samples = [Sample(what, unit, value, (place,), right) for place, (value, right) in results]
        return Kind(what, "devices", 0, expected, samples)

    def transfer(self, transfer: Transfer, all_groups: Sequence[Sequence[int]], where: str) -> Kind:
        """One transfer, in all of these groups at once; the slowest of its ranks is a group's speed."""
        size = len(all_groups[0])
        over = " x ".join(a for a in transfer.axes if getattr(self._config.parallel, a) > 1)
        what = f"{transfer.what}, {transfer.operation} over {over} = {size}"
        self._say(f"{what}, {transfer.bytes / 2**20:.4g} MiB, {where}")
        comm = self._comm(all_groups)
        dist.barrier()
        own = None if comm is None else measure_transfer(transfer, comm, self._bench)
        results = self._gather(own)
        expected = self._judging.expected
        speed = expected.within_node_gb_s if where == "within nodes" else expected.between_nodes_gb_s
        samples = []
        for group in all_groups:
            values, rights = zip(*(results[rank] for rank in group), strict=True)
            places = tuple(self._places[rank] for rank in group)
            samples.append(Sample(what, "GB/s", min(values), places, all(rights)))
        return Kind(what, where, transfer.bytes, speed, samples)

    def pairs(self, num_bytes: int) -> Kind:
        """Each device with its like on the next node of the ring, both ways at once."""
        num_bytes = min(max(num_bytes, _LEAST_PAIR_BYTES), _MOST_PAIR_BYTES)
        what, per_node, samples = "hop to the next node", len(self._places) // len(self._names), []
        self._say(f"{what}, {num_bytes / 2**20:.4g} MiB")
        node, local = divmod(self._rank, per_node)
        for pairs in ring_rounds(len(self._names)):
            dist.barrier()
            peer = next((a + b - node for a, b in pairs if node in (a, b)), None)
            own = None if peer is None else measure_pair(peer * per_node + local, num_bytes, self._bench)
            results = self._gather(own)
            for a, b in pairs:
                for device in range(per_node):
                    ends = a * per_node + device, b * per_node + device
                    values, rights = zip(*(results[rank] for rank in ends), strict=True)
                    places = tuple(self._places[rank] for rank in ends)
                    samples.append(Sample(what, "GB/s", min(values), places, all(rights)))
        return Kind(what, "node to node", num_bytes, self._judging.expected.between_nodes_gb_s, samples)

    def _comm(self, all_groups: Sequence[Sequence[int]]) -> Comm | None:
        """This rank's group; None if it is in none. Made once for the same groups, on all ranks."""
        key = tuple(map(tuple, all_groups))
        if key not in self._made:
            mine = [group for group in key if self._rank in group]
            made = _make_groups(all_groups, timedelta(seconds=self._judging.timeout_s))
            self._made[key] = Comm(made) if mine else None
        return self._made[key]

    def _gather(self, own: Any) -> list[Any]:
        results: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(results, own)
        return results

    def _say(self, text: str) -> None:
        """What begins, so that it is known where a transfer that never ends was."""
        if self._rank == 0:
            print(f"preflight: {text} ...", file=sys.stderr, flush=True)


def _make_groups(all_groups: Sequence[Sequence[int]], timeout: timedelta) -> Any:
    """This rank's process group of several that share no rank; on all ranks."""
    if getattr(dist.group.WORLD, "bound_device_id", None) is not None:
        # NCCL splits all at once, as it does for the run's DeviceMesh.
        return dist.split_group(split_ranks=[list(group) for group in all_groups], timeout=timeout)
    made = [dist.new_group(list(group), timeout=timeout) for group in all_groups]
    return next((m for m, group in zip(made, all_groups, strict=True) if dist.get_rank() in group), None)
