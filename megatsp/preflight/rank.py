"""A rank of `megatsp preflight`: it joins the others, measures with them, and rank 0 tells what was found."""

import json
import os
import resource
import sys
from argparse import Namespace
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatsp.axes import meeting
from megatsp.checkpoint.agree import on_each
from megatsp.cluster.profiles import Expected, load_profile
from megatsp.cluster.start import enter
from megatsp.exit_status import HARDWARE, USER_ERROR
from megatsp.launcher.failures import Failure
from megatsp.launcher.outcome import ATTEMPT_FOLDER, node_name, write_outcome
from megatsp.launcher.rank import LAUNCHER_PID
from megatsp.preflight.command import composed
from megatsp.preflight.decide import describe, too_few
from megatsp.preflight.examine import Found, Judging, examine
from megatsp.preflight.files import MEASURED, NODES, read_names, write_names, write_report
from megatsp.preflight.guard import Guard
from megatsp.preflight.judge import Place
from megatsp.preflight.measure import Bench
from megatsp.preflight.presence import GPU, Presence, judge_presence, look
from megatsp.preflight.report import as_json, table
from megatsp.schema import Config
from megatsp.validate import validate

# Of one measurement, with what it loads and connects first; then the rank says for whom it waits, and ends.
_LIMIT_S = 180.0
_TIMEOUT_S = 300.0  # of a collective: later, or other ranks would end before one that can say why


def run(given: Namespace) -> int:
    """This rank's part of `megatsp preflight`; returns the exit status, on all ranks the same.

    Raises:
        ValueError: a user's mistake, under our own launcher, which shows it once.
    """
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    mistake: ValueError | None = None
    try:
        config, expected = _enter(given, rank)
    except ValueError as error:  # told when all have joined, so that it is told once
        mistake = error
    _join()
    try:
        on_each(partial(_raise, mistake))
        limit_s = min(_LIMIT_S, config.launch.timeout_s)
        present = on_each(partial(_look, config.launch.device, local_rank, limit_s, given.folder))
        places, unfit = judge_presence(present, config.launch.device, given.folder is not None)
        on_gpus = places[0].kind == GPU
        (needed, per_node, config), *_ = on_each(lambda: _checked(config, places, given.folder))
    except ValueError as error:
        if LAUNCHER_PID in os.environ and ATTEMPT_FOLDER not in os.environ:
            raise
        return _refuse(error, given.folder)
    excluding = given.slow == "exclude" or (given.slow == "auto" and on_gpus)
    judging = Judging(expected, given.fraction, excluding, _TIMEOUT_S, limit_s, given.folder)
    bench = Bench(torch.device("cuda", local_rank) if on_gpus else torch.device("cpu"), given.repeats)
    found = examine(config, places, needed, bench, judging, unfit)
    if rank == 0:
        _tell(found, given, per_node, config.launch.profile)
    dist.barrier()
    dist.destroy_process_group()
    return HARDWARE if found.choice is None else 0


def _raise(error: ValueError | None) -> None:
    if error is not None:
        raise error


def _enter(given: Namespace, rank: int) -> tuple[Config, Expected]:
    """The run's configuration and what its profile expects, whose variables are set."""
    config = composed(given)
    lines = enter(config, os.environ)
    for line in lines if rank == 0 else ():
        print(line, file=sys.stderr if given.json else sys.stdout, flush=True)
    return config, load_profile(config.launch.profile).expected


def _join(**where: Any) -> None:
    """Joins the default process group: gloo's, so that control needs neither devices nor their network."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 1024 + 4 * int(os.environ["WORLD_SIZE"])  # a rank has a connection to each other one
    if 0 <= soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard) if hard >= 0 else wanted, hard))
    where = where or meeting(os.environ)
    dist.init_process_group("gloo", timeout=timedelta(seconds=_TIMEOUT_S), **where)


def _look(wanted: str, local_rank: int, limit_s: float, folder: Path | None) -> Presence:
    """What this rank has. A driver may never answer, so its node is suspected after a while."""
    place = Place(node_name(), local_rank, "local rank")
    with Guard([place] * dist.get_world_size(), limit_s, folder).over("the first use of its device"):
        return look(place.node, local_rank, wanted)


def _refuse(error: ValueError, folder: Path | None) -> int:
    """Tells a mistake once, before any rank goes: its launcher then ends the others."""
    if dist.get_rank() == 0:
        print(f"megatsp: error: {error}", file=sys.stderr, flush=True)
        if folder is not None:
            write_outcome(folder, Failure(0, USER_ERROR, str(error)))
    dist.barrier()
    return USER_ERROR


def _checked(config: Config, places: Sequence[Place], folder: Path | None) -> tuple[int, int, Config]:
    """(nodes that the run needs, ranks of a node, the configuration validated for them)."""
    needed, per_node = _needed(config, places, folder)
    return needed, per_node, validate(config, needed * per_node)


def _needed(config: Config, places: Sequence[Place], folder: Path | None) -> tuple[int, int]:
    """(nodes that the run needs, ranks of a node).

    Raises:
        ValueError: ranks are not numbered node by node, or these are not a job's nodes.
    """
    names = list(dict.fromkeys(place.node for place in places))
    per_node, left = divmod(len(places), len(names))
    if left or any(places[i].node != names[i // per_node] for i in range(len(places))):
        raise ValueError(
            f"{len(places)} ranks on {len(names)} nodes are not numbered node by node, as many on each: "
            "start them by srun --distribution=block --ntasks-per-node, or by torchrun"
        )
    if folder is None:
        return len(names), per_node
    launch = config.launch
    if per_node != launch.nproc or len(names) < launch.nodes:
        raise ValueError(
            f"{len(names)} nodes of {per_node} ranks, but the job has launch.nodes={launch.nodes} of "
            f"launch.nproc={launch.nproc}: start one task a rank on each node of present.txt"
        )
    if missing := [name for name in read_names(folder / NODES) if name not in names]:
        raise ValueError(
            f"{folder / NODES} names {missing[0]}, where no rank is: start them on the nodes of present.txt"
        )
    return launch.nodes, per_node


def _tell(found: Found, given: Namespace, per_node: int, profile: str) -> None:
    """Prints the report and, in a job, writes it and the chosen nodes."""
    report, choice = as_json(found), found.choice
    if given.folder is not None:
        write_report(given.folder / MEASURED, report)
        if choice is not None:
            write_names(given.folder / NODES, choice.chosen)
    if given.json:
        print(json.dumps(report, indent=1), flush=True)
    else:
        print("\n".join(table(found, per_node, profile)))
        if choice is not None:
            print("\n".join(describe(choice, found.verdict.bad)))
        sys.stdout.flush()
    if choice is None:
        unclear, bad = found.verdict.unclear, found.verdict.bad
        text = _whose(unclear) if unclear else too_few(found.names, bad, found.needed)
        print(f"megatsp: error: {text}", file=sys.stderr, flush=True)


def _whose(unclear: Sequence[str]) -> str:
    """The message when data was wrong and no node can be blamed."""
    lines = [f"  {text}" for text in unclear]
    return "\n".join([
        "data arrived wrong, and nothing tells which of the nodes made it so:", *lines,
        "a run on them would be wrong: measure other sets of them (launch.slurm.exclude, srun --nodelist) "
        "to find it",
    ])  # fmt: skip
