"""`python -m megatsp.preflight.roll_call`: every rank of an allocation tells rank 0 where and what it is.

One task a rank, under srun. Imports neither torch nor any other package: 1,024 ranks may start on two
cores. Rank 0 judges the nodes, chooses those that the job runs on, writes their names, and tells
every rank its place on the mesh, which the rank holds against the one it computes itself.

Exit status: 0, there are enough good nodes, also of ranks that came too late to be among them; 2, a user's
mistake; 77, too few nodes are as they should be, or rank 0 cannot be reached.
"""

import math
import os
import socket
import sys
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatsp.cluster.mesh import coordinates, groups
from megatsp.exit_status import FAILURE, HARDWARE, USER_ERROR
from megatsp.nearest import did_you_mean
from megatsp.parser import Parser
from megatsp.preflight.files import NODES, PRESENT, ROLL_CALL, read_report, write_names, write_report
from megatsp.preflight.guest import Over, Unreachable, attend
from megatsp.schema import AXES

if TYPE_CHECKING:
    from megatsp.preflight.decide import Answer, Choice, Node

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_MARGIN_S = 60.0  # that a rank gives rank 0 beyond its timeout, to judge and to tell


@dataclass(frozen=True)
class Task:
    """Who this process is among the tasks of the allocation."""

    rank: int
    world: int
    local_rank: int
    node: str
    job: str
    node_list: str


def find_task(environment: Mapping[str, str]) -> Task:
    """Of torchrun's variables, or of srun's.

    Raises:
        ValueError: there are none.
    """
    numbers = []
    for ours, slurms in (
        ("RANK", "SLURM_PROCID"), ("WORLD_SIZE", "SLURM_NTASKS"), ("LOCAL_RANK", "SLURM_LOCALID"),
    ):  # fmt: skip
        text = environment.get(ours) or environment.get(slurms, "")
        if not text.isdecimal():
            raise ValueError(f"neither {ours} nor {slurms} is a number: start one task a rank by srun")
        numbers.append(int(text))
    rank, world, local_rank = numbers
    return Task(
        rank,
        world,
        local_rank,
        environment.get("SLURMD_NODENAME") or socket.gethostname(),
        environment.get("SLURM_JOB_ID", ""),
        environment.get("SLURM_STEP_NODELIST", ""),
    )


def read_mesh(text: str) -> dict[str, int]:
    """Such as dp_replicate=1,dp_shard=16,cp=1,tsp=8,tp=1, as the ranks of each axis.

    Raises:
        ValueError: an axis is missing, unknown or no positive number.
    """
    sizes: dict[str, int] = {}
    for item in text.split(","):
        axis, _, size = item.partition("=")
        if axis not in AXES:
            raise ValueError(
                f"--mesh: unknown axis {axis!r}{did_you_mean(axis, AXES)}; give {', '.join(AXES)}"
            )
        if not size.isdecimal() or int(size) < 1:
            raise ValueError(f"--mesh: {item!r}: give a number of ranks, such as {axis}=8")
        sizes[axis] = int(size)
    if missing := [axis for axis in AXES if axis not in sizes]:
        raise ValueError(f"--mesh lacks {missing[0]}: give a size for each of {', '.join(AXES)}")
    return {axis: sizes[axis] for axis in AXES}


def check_mesh(sizes: Mapping[str, int], nodes: int, ranks_per_node: int) -> None:
    """Raises ValueError unless the mesh has the nodes' ranks and every tsp and tp group lies in one node."""
    product = math.prod(sizes.values())
    if product != nodes * ranks_per_node:
        shown = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
        raise ValueError(
            f"the mesh {shown} has {product} ranks, but {nodes} nodes of {ranks_per_node} have "
            f"{nodes * ranks_per_node}: change parallel.*, launch.nodes or launch.nproc"
        )
    for axis in ("tsp", "tp"):
        for group in groups(axis, sizes):
            first, last = group[0] // ranks_per_node, group[-1] // ranks_per_node
            if first != last:
                raise ValueError(
                    f"parallel.{axis}={sizes[axis]}: a group of it, ranks {group[0]} to {group[-1]}, would "
                    f"lie on nodes {first} to {last} of the mesh; tsp x tp must divide the {ranks_per_node} "
                    "ranks of a node (launch.nproc)"
                )


def main(arguments: Sequence[str], environment: Mapping[str, str] = os.environ) -> int:
    """Runs this rank's part; returns the exit status."""
    rank = 0
    try:
        task = find_task(environment)
        rank = task.rank
        given = _parse(arguments)
        sizes = read_mesh(given.mesh)
        check_mesh(sizes, given.nodes, given.ranks_per_node)
        if task.world % given.ranks_per_node:
            raise ValueError(
                f"{task.world} tasks: start {given.ranks_per_node} on each of {given.nodes} nodes and spares"
            )
        if rank == 0:
            return _run_first(given, sizes, task)
    except ValueError as error:
        if rank == 0:
            print(f"megatsp: error: {error}", file=sys.stderr)
        return USER_ERROR
    return _run_other(given, sizes, task)


def _parse(arguments: Sequence[str]) -> Namespace:
    parser = Parser(
        "python -m megatsp.preflight.roll_call", "Finds a job's good nodes; see docs/preflight.md."
    )
    parser.add_argument("--address", required=True, metavar="HOST:PORT", help="where rank 0 listens")
    parser.add_argument("--nodes", required=True, type=int, metavar="N", help="nodes that the job needs")
    parser.add_argument("--ranks-per-node", required=True, type=int, metavar="R", help="tasks of each node")
    parser.add_argument(
        "--mesh", required=True, help="ranks of every axis: " + ",".join(f"{a}=1" for a in AXES)
    )
    parser.add_argument("--folder", required=True, type=Path, help="where results go; shared by all nodes")
    parser.add_argument(
        "--timeout", type=float, default=300.0, metavar="SECONDS", help="wait for ranks (300)"
    )
    parser.add_argument("--devices", action="store_true", help="each rank is to have a GPU")
    given = parser.parse_args(arguments)
    for option in ("nodes", "ranks_per_node", "timeout"):
        if getattr(given, option) <= 0:
            raise ValueError(f"--{option.replace('_', '-')} {getattr(given, option)}: must be positive")
    host, _, port = given.address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"--address {given.address}: give HOST:PORT, such as n1:29500")
    given.address = host.strip("[]"), int(port)
    return given


def _own_answer(task: Task) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if task.local_rank == 0:
        from megatsp.preflight.facts import facts  # costs more than all else: once a node

        found = facts()
    boot_id = _BOOT_ID.read_text().strip() if _BOOT_ID.is_file() else ""
    return {
        "rank": task.rank, "node": task.node, "local_rank": task.local_rank, "job": task.job,
        "boot_id": boot_id, "facts": found,
    }  # fmt: skip


def _run_other(given: Namespace, sizes: Mapping[str, int], task: Task) -> int:
    # Later than rank 0, which then has judged without this rank.
    patience_s = given.timeout + min(given.timeout, _MARGIN_S)
    deadline = time.monotonic() + patience_s
    try:
        told = attend(
            given.address, given.folder, ROLL_CALL, _own_answer(task), deadline, given.timeout + _MARGIN_S
        )
    except Over as error:
        if task.local_rank == 0:
            print(f"roll call: rank {task.rank} on {task.node} was too late: {error}", file=sys.stderr)
        return 0 if read_report(given.folder / ROLL_CALL)["enough"] else HARDWARE
    except Unreachable as error:
        if task.local_rank == 0:
            host, port = given.address
            print(
                f"megatsp: error: rank {task.rank} on {task.node} has not reached rank 0 at {host}:{port} in "
                f"{patience_s:g} s ({error}): look whether rank 0 has started, whether {host} is its "
                "node's address on a network that all nodes share, and whether a firewall closes the port",
                file=sys.stderr,
            )
        return HARDWARE
    if told["status"] == 0 and told["rank"] >= 0:
        own = coordinates(told["rank"], list(sizes.values()))
        if own != told["coordinates"] or told["rank"] % given.ranks_per_node != task.local_rank:
            print(
                f"megatsp: error: rank {task.rank} on {task.node} was told the place {told['coordinates']} "
                f"of rank {told['rank']}, but computes {own}: do all nodes run the same megatsp?",
                file=sys.stderr,
            )
            return FAILURE
    status: int = told["status"]
    return status


def _run_first(given: Namespace, sizes: Mapping[str, int], task: Task) -> int:
    """Rank 0's part. Its modules are loaded by it alone."""
    from megatsp.preflight.decide import Answer, choose, describe, judge_nodes, too_few
    from megatsp.preflight.host import Host, Token, listen
    from megatsp.preflight.node_names import expand

    start = time.monotonic()
    with Token(given.folder) as token, Host(
        listen(given.address[1], task.world), token, task.job, task.world
    ) as host:  # fmt: skip
        own = _own_answer(task)
        first = Answer(0, task.node, task.local_rank, own["boot_id"], True, facts=own["facts"])
        answers = [first, *host.collect(start + given.timeout)]
        num_nodes = task.world // given.ranks_per_node
        nodes = judge_nodes(answers, num_nodes, given.ranks_per_node, expand(task.node_list), given.devices)
        names = [node.name for node in nodes]
        bad = {node.name: node.reasons for node in nodes if node.reasons}
        choice = choose(names, bad, given.nodes)
        ranks = _places(answers, choice, sizes, given.ranks_per_node)
        _write(given.folder, nodes, choice, ranks)
        status = HARDWARE if choice is None else 0
        host.tell({rank: {"status": status, **place} for rank, place in ranks.items()})
    seconds = time.monotonic() - start
    print(f"roll call: {len(answers)} of {task.world} ranks of {num_nodes} nodes answered in {seconds:.1f} s")
    for node in nodes:
        for note in node.notes:
            print(f"roll call: {node.name}: warning: {note}")
    if choice is None:
        print(f"megatsp: error: {too_few(names, bad, given.nodes)}", file=sys.stderr)
        return HARDWARE
    for line in describe(choice, bad):
        print(f"roll call: {line}")
    return 0


def _places(
    answers: Sequence["Answer"], choice: "Choice | None", sizes: Mapping[str, int], ranks_per_node: int
) -> dict[int, dict[str, Any]]:
    """By rank of the allocation: its rank in the job and place on the mesh; rank -1 of those left out."""
    position = {name: index for index, name in enumerate(choice.chosen if choice else [])}
    found: dict[int, dict[str, Any]] = {}
    for answer in answers:
        rank, place = -1, {}
        if answer.node in position:
            rank = position[answer.node] * ranks_per_node + answer.local_rank
            place = coordinates(rank, list(sizes.values()))
        found[answer.rank] = {
            "node": answer.node, "local_rank": answer.local_rank, "rank": rank, "coordinates": place,
        }  # fmt: skip
    return found


def _write(
    folder: Path, nodes: Sequence["Node"], choice: "Choice | None", ranks: Mapping[int, Mapping[str, Any]]
) -> None:
    chosen, spares = (choice.chosen, choice.spares) if choice else ([], [])
    replaced = dict(choice.replaced) if choice else {}
    report = {
        "enough": choice is not None,
        "nodes": [
            {
                "node": node.name, "job": node.name in chosen, "reasons": node.reasons, "notes": node.notes,
                "replaced_by": replaced.get(node.name, ""), **node.facts,
            }
            for node in nodes
        ],
        "ranks": [{"task": task, **ranks[task]} for task in sorted(ranks)],
    }  # fmt: skip
    write_report(folder / ROLL_CALL, report)
    if choice is not None:
        present = {*chosen, *spares}
        write_names(folder / PRESENT, [node.name for node in nodes if node.name in present])
        write_names(folder / NODES, chosen)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
