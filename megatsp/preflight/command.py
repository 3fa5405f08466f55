"""The command `megatsp preflight`: measures what a run will do, on the nodes that it would run on."""

import json
import os
import socket
import sys
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from megatsp.axes import choose_device, join
from megatsp.checkpoint.agree import on_each
from megatsp.cluster.profiles import load_profile
from megatsp.compose import compose
from megatsp.exit_status import HARDWARE, USER_ERROR
from megatsp.parser import Parser
from megatsp.preflight.decide import describe, too_few
from megatsp.preflight.examine import Found, Judging, examine
from megatsp.preflight.files import MEASURED, NODES, read_names, write_names, write_report
from megatsp.preflight.judge import Place
from megatsp.preflight.measure import Bench
from megatsp.preflight.report import as_json, table
from megatsp.schema import Config
from megatsp.validate import validate

_TIMEOUT_S = 300.0  # of a collective; a run's own may be longer

DESCRIPTION = """\
Measures every device and the transfers that `megatsp train` with the same overrides would make, at their
sizes, within nodes and between them; names what is slow or wrong by host and device. Alone it starts
launch.nproc ranks here; under torchrun or srun it measures their nodes. In a job of `megatsp launch`, bad
nodes are left out and spare ones take their places. Exit status 77 if too few nodes are good.

  megatsp preflight experiment=quickstart launch.nproc=2 parallel.tsp=2
  torchrun --nnodes 2 --nproc-per-node 8 ... -m megatsp preflight experiment=... parallel.tsp=8
"""


def parse(arguments: Sequence[str]) -> Namespace:
    """The options; overrides are a training's.

    Raises:
        ValueError: unknown option, or a number out of its range.
    """
    parser = Parser("megatsp preflight", DESCRIPTION, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--sft", action="store_true", help="overrides are those of `megatsp sft`")
    parser.add_argument("--config-dir", type=Path, help="folder with groups of your own")
    parser.add_argument(
        "--folder", type=Path, help=f"in a job: where {NODES} of the roll call is, to be narrowed down"
    )
    text = "below this share of the expected or median speed a device or transfer is slow (default: 0.7)"
    parser.add_argument("--fraction", type=float, default=0.7, help=text)
    parser.add_argument("--repeats", type=int, default=5, help="timings, whose median counts (default: 5)")
    text = "what becomes of slow nodes; auto: left out on GPUs, a warning on CPUs, whose cores ranks share"
    parser.add_argument("--slow", choices=("auto", "exclude", "warn"), default="auto", help=text)
    parser.add_argument("--json", action="store_true", help="print an object for programs")
    parser.add_argument("overrides", nargs="*", help="those of the run")
    given = parser.parse_intermixed_args(list(arguments))
    if not 0 < given.fraction < 1:
        raise ValueError(f"--fraction {given.fraction}: must be in (0, 1)")
    if given.repeats < 1:
        raise ValueError(f"--repeats {given.repeats}: must be at least 1")
    if given.folder is not None and not (given.folder / NODES).is_file():
        raise ValueError(f"--folder {given.folder}: no {NODES} in it, which the roll call of a job writes")
    return given


def composed(given: Namespace) -> Config:
    """The run's configuration, not yet validated."""
    return compose(given.overrides, given.config_dir, "sft" if given.sft else "train")


def run(given: Namespace) -> int:
    """This rank's part of `megatsp preflight`; returns the exit status, on all ranks the same."""
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    try:
        config = composed(given)
        expected = load_profile(config.launch.profile).expected
    except ValueError:
        if local_rank == 0:  # once a node: it may be that of one node alone
            raise
        return USER_ERROR
    device = choose_device(config.launch.device)
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    if device.type == "cuda" and local_rank >= (count := torch.cuda.device_count()):
        raise ValueError(f"{node} has {count} GPUs, but a local rank {local_rank}: give launch.nproc={count}")
    timeout_s = min(_TIMEOUT_S, config.launch.timeout_s)
    join(device, timeout_s)
    places: list[Place] = [Place("", 0)] * dist.get_world_size()
    dist.all_gather_object(places, Place(node, local_rank, "GPU" if device.type == "cuda" else "CPU rank"))
    try:
        needed, per_node, config = on_each(lambda: _checked(config, places, given.folder))[0]
    except ValueError:
        if rank == 0:
            raise
        return USER_ERROR
    excluding = given.slow == "exclude" or (given.slow == "auto" and device.type == "cuda")
    judging = Judging(expected, given.fraction, excluding, timeout_s)
    found = examine(config, places, needed, Bench(device, given.repeats), judging)
    if rank == 0:
        _tell(found, given, per_node, config.launch.profile)
    dist.barrier()
    dist.destroy_process_group()
    return HARDWARE if found.choice is None else 0


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
        text = too_few(found.names, found.verdict.bad, found.needed)
        print(f"megatsp: error: {text}", file=sys.stderr, flush=True)
