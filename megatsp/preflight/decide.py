"""Of the answers to a roll call: which nodes are as they should be, and which of them the job runs on.

Pure: no sockets, no files. A node is judged against what most nodes say, so that nobody has to write
down which versions a cluster has; where as many say one thing as another, the first node's counts.
"""

import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_SKEW_ODD_S, _SKEW_WRONG_S = 0.5, 30.0


@dataclass(frozen=True)
class Answer:
    """What one rank said.

    boot_id: of its kernel. sees_folder: whether it read there what rank 0 wrote. offset_s: how far its
    clock is ahead of rank 0's, known to +- error_s. facts: its node's, of first ranks alone.
    """

    rank: int
    node: str
    local_rank: int
    boot_id: str
    sees_folder: bool
    offset_s: float = 0.0
    error_s: float = 0.0
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Node:
    """A node of the allocation. reasons: why it cannot be used; notes: what is odd, but no reason."""

    index: int
    name: str
    answers: list[Answer]
    reasons: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def facts(self) -> Mapping[str, Any]:
        return next((answer.facts for answer in self.answers if answer.facts), {})


def judge_nodes(
    answers: Sequence[Answer], num_nodes: int, ranks_per_node: int, names: Sequence[str], devices: bool
) -> list[Node]:
    """Every node of the allocation, in its order, with what is wrong with it.

    names: of the nodes in order, for those that nobody spoke for; may be empty. devices: each rank is to
    have a GPU.
    """
    nodes = []
    for index in range(num_nodes):
        own = sorted((a for a in answers if a.rank // ranks_per_node == index), key=lambda a: a.rank)
        given = names[index] if index < len(names) else f"node {index} of the allocation"
        nodes.append(Node(index, own[0].node if own else given, own))
    for node in nodes:
        node.reasons += _of_ranks(node, ranks_per_node)
    _shared_names(nodes)
    _judge_facts(nodes, ranks_per_node if devices else 0)
    _skewed(nodes)
    return nodes


def judge_facts(facts: Mapping[str, Mapping[str, Any]], ranks: int) -> dict[str, list[str]]:
    """By node: what its facts say against it, if anything. ranks: of a node that need a GPU each."""
    nodes = [
        Node(i, name, [Answer(0, name, 0, "", True, facts=own)])
        for i, (name, own) in enumerate(facts.items())
    ]
    _judge_facts(nodes, ranks)
    return {node.name: node.reasons for node in nodes if node.reasons}


def _of_ranks(node: Node, ranks_per_node: int) -> Iterator[str]:
    first = node.index * ranks_per_node
    present = {answer.rank for answer in node.answers}
    missing = [rank for rank in range(first, first + ranks_per_node) if rank not in present]
    if len(missing) == ranks_per_node:
        yield f"none of its ranks {first} to {first + ranks_per_node - 1} has answered"
        return
    if missing:
        yield f"no answer from rank{_list(missing)}"
    for answer in node.answers:
        if answer.local_rank != answer.rank - first or answer.node != node.name:
            yield (
                f"rank {answer.rank} is local rank {answer.local_rank} of {answer.node}: ranks must be "
                "numbered node by node (srun --distribution=block)"
            )
            break
    if len({answer.boot_id for answer in node.answers}) > 1:
        yield "its ranks do not run under one kernel"
    if blind := [answer.local_rank for answer in node.answers if not answer.sees_folder]:
        yield f"local rank{_list(blind)} cannot read what rank 0 wrote to the folder: is it shared?"


def _list(numbers: Sequence[int]) -> str:
    """The end of "rank" before some numbers: " 3", "s 3, 4"."""
    shown = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
    return f"{'s' * (len(numbers) > 1)} {shown}"


def _shared_names(nodes: Sequence[Node]) -> None:
    seen: dict[str, Node] = {}
    for node in nodes:
        other = seen.setdefault(node.name, node)
        if other is not node and node.answers:
            node.reasons.append(f"it has more ranks than one node's: {other.answers[0].rank} is there too")


def _of_devices(facts: Mapping[str, Any], ranks: int) -> Iterator[str]:
    """ranks: of a node that need a GPU each."""
    if facts["gpu_error"]:
        yield f"its GPUs do not answer: {facts['gpu_error']}"
    if facts["gpus"] < ranks:
        yield f"{facts['gpus']} GPUs for {ranks} ranks"


def _judge_facts(nodes: Sequence[Node], ranks: int) -> None:
    """GPUs that do not answer or are too few; versions, driver and devices other than most nodes'."""
    told = [node for node in nodes if node.facts]
    for node in told:
        node.reasons += _of_devices(node.facts, ranks)
    packages = dict.fromkeys(name for node in told for name in node.facts["versions"])
    subjects: dict[str, Callable[[Mapping[str, Any]], Any]] = {
        name: lambda facts, name=name: facts["versions"].get(name, "none")  # type: ignore[misc]
        for name in packages
    }
    subjects["driver"] = lambda facts: facts["driver"] or "none that is known"
    subjects["GPUs"] = lambda facts: facts["gpus"]
    for subject, value in subjects.items():
        _against_most(told, lambda node, value=value: value(node.facts), subject)  # type: ignore[misc]
    for gpu in range(max((len(node.facts["gpu_bytes"]) for node in told), default=0)):
        having = [node for node in told if len(node.facts["gpu_bytes"]) > gpu]
        _against_most(
            having,
            lambda node, gpu=gpu: f"{node.facts['gpu_bytes'][gpu] / 2**30:.1f} GiB",  # type: ignore[misc]
            f"memory of GPU {gpu}:",
        )


def _against_most(nodes: Sequence[Node], value: Callable[[Node], Any], subject: str) -> None:
    counts = Counter(value(node) for node in nodes)
    if len(counts) < 2:
        return
    usual, count = counts.most_common(1)[0]
    for node in nodes:
        if value(node) != usual:
            node.reasons.append(f"{subject} {value(node)}, but {usual} on {count} of {len(nodes)} nodes")


def _skewed(nodes: Sequence[Node]) -> None:
    best = {node.index: min(node.answers, key=lambda a: a.error_s) for node in nodes if node.answers}
    if not best:
        return
    usual = statistics.median_low(answer.offset_s for answer in best.values())
    for index, answer in best.items():
        offset = answer.offset_s - usual
        surely = max(0.0, abs(offset) - answer.error_s)
        text = f"its clock is {abs(offset):.1f} s {'ahead of' if offset > 0 else 'behind'} most nodes'"
        if surely > _SKEW_WRONG_S:
            nodes[index].reasons.append(text)
        elif surely > _SKEW_ODD_S:
            nodes[index].notes.append(text)


@dataclass(frozen=True)
class Choice:
    """chosen: nodes that the job runs on, in order. spares: good ones that are left.

    replaced: (bad node, the spare in its place).
    """

    chosen: list[str]
    spares: list[str]
    replaced: list[tuple[str, str]]


def choose(names: Sequence[str], bad: Mapping[str, Sequence[str]], needed: int) -> Choice | None:
    """The first `needed` good nodes in the order of the allocation; None if there are too few.

    bad: the nodes that cannot be used, with the reasons.
    """
    good = [name for name in names if name not in bad]
    if len(good) < needed:
        return None
    lost = [name for name in names[:needed] if name in bad]
    takers = [name for name in good[:needed] if name not in names[:needed]]
    return Choice(good[:needed], good[needed:], list(zip(lost, takers, strict=True)))


def describe(choice: Choice, bad: Mapping[str, Sequence[str]]) -> list[str]:
    """A choice of nodes as lines: what is wrong with each bad node, which spare is in whose place."""
    lines = [f"{name} is left out: {'; '.join(reasons)}" for name, reasons in bad.items()]
    lines += [f"{spare} takes the place of {lost}" for lost, spare in choice.replaced]
    shown = ", ".join(choice.chosen[:4]) + (f" ... {choice.chosen[-1]}" if len(choice.chosen) > 4 else "")
    left = f", {len(choice.spares)} more to spare" if choice.spares else ""
    count = f"{len(choice.chosen)} node{'s' * (len(choice.chosen) > 1)}"
    return [*lines, f"the job runs on {count}: {shown}{left}"]


def too_few(names: Sequence[str], bad: Mapping[str, Sequence[str]], needed: int) -> str:
    """The message when `choose` finds none: every bad node with its reasons, and what to do."""
    lines = [
        f"{needed} node{'s are' if needed > 1 else ' is'} needed, but only {len(names) - len(bad)} of the "
        f"{len(names)} that are there can be used:"
    ]
    lines += [f"  {name}: {'; '.join(reasons)}" for name, reasons in bad.items()]
    lines.append(
        "give the job spares by launch.spare_nodes, keep it off these by launch.slurm.exclude, or mend them"
    )
    return "\n".join(lines)
