"""The command `megatsp doctor`: on this host, or on every host of torchrun or srun at once."""

import json
import os
import socket
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

from megatsp.doctor.finding import PROBLEM, Finding
from megatsp.doctor.report import as_json, count, table
from megatsp.parser import Parser

_TIMEOUT_S = 300

DESCRIPTION = """\
Says what would keep a run from starting, from being right or from being fast, and how to mend it:
versions, GPUs and their links, kernels, the folder of runs, limits, clocks, network, environment.
Exit status 1 if there is a problem. Under torchrun or srun hosts are examined and compared:

  megatsp doctor --output-dir /scratch/runs
  srun --ntasks-per-node=1 megatsp doctor
"""


def run(arguments: Sequence[str]) -> int:
    """Runs `megatsp doctor`; returns the exit status, on all ranks the same."""
    parser = Parser("megatsp doctor", DESCRIPTION, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=Path("outputs"),
        metavar="FOLDER",
        help="where runs will be written (default: outputs)",
    )
    parser.add_argument("--json", action="store_true", help="print an object for programs")
    given = parser.parse_args(arguments)
    output_dir = given.output_dir.expanduser()
    import torch
    import torch.distributed as dist

    from megatsp.axes import join
    from megatsp.doctor.checks import examine

    if "RANK" in os.environ:
        join(torch.device("cpu"), _TIMEOUT_S)
        hosts = examine_hosts(output_dir)
        dist.barrier()
        dist.destroy_process_group()
    else:
        hosts = {socket.gethostname(): examine(output_dir)}
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(as_json(hosts), indent=2) if given.json else "\n".join(table(hosts)), flush=True)
    return 1 if count(hosts)[PROBLEM] else 0


def examine_hosts(output_dir: Path) -> dict[str, list[Finding]]:
    """On all ranks: what each host's first rank finds there, and its clock against rank 0's."""
    import torch.distributed as dist

    from megatsp.doctor.checks import examine
    from megatsp.doctor.clock import check_skew, offset_to_first

    offset, error = offset_to_first()
    own: list[Finding] = []
    if os.environ.get("LOCAL_RANK", "0") == "0":
        own = examine(output_dir)
        if dist.get_rank():
            own += check_skew("rank 0's host", offset, error)
    gathered: list[tuple[str, list[Finding]]] = [("", [])] * dist.get_world_size()
    dist.all_gather_object(gathered, (socket.gethostname(), own))
    hosts: dict[str, list[Finding]] = {}
    for name, findings in gathered:
        hosts.setdefault(name, []).extend(findings)
    return hosts
