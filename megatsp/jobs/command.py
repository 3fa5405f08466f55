"""The command `megatsp launch`: where a training runs, and what becomes of it there."""

import os
import shlex
import sys
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence

from megatsp.jobs.script import script
from megatsp.jobs.submit import COMMANDS, plan, submit
from megatsp.nearest import did_you_mean
from megatsp.parser import Parser

USAGE = """\
usage: megatsp launch WHERE [options] [train | sft | preflight] [group=choice | key=value ...]
       megatsp launch status | logs | cancel RUN_FOLDER_OR_JOB

  local      here, as `megatsp train` does
  torchrun   here, as one of launch.nodes nodes: run it on each    megatsp launch torchrun --help
  slurm      as a job of a Slurm cluster                           megatsp launch slurm --help
  status     the jobs of a run, their attempts, how far it is
  logs       what failed first, and what ranks say                 megatsp launch logs --help
  cancel     end a job after a save, or at once                    megatsp launch cancel --help

WHERE may be followed by `sft` or `preflight` in place of `train`; what comes then are arguments of that
command. launch.nodes, launch.nproc (ranks of a node) and launch.slurm.* say how large the job is, and which
queue it waits in; launch.profile sets what its kind of cluster needs.

examples:
  megatsp launch slurm experiment=quickstart parallel.tsp=2 trainer.global_batch_size=32 \\
      launch.nodes=2 launch.nproc=2 launch.device=cpu --dry-run
  megatsp launch slurm train model=gpt_7b trainer=bf16 parallel.tsp=8 trainer.seq_length=131072 \\
      trainer.micro_batch_size=1 trainer.global_batch_size=128 launch=mi300x launch.nodes=128 \\
      launch.spare_nodes=2 launch.slurm.partition=gpu launch.slurm.time=24:00:00
  megatsp launch status outputs/run
"""


def run(arguments: Sequence[str], train: Callable[[str, list[str]], int]) -> int:
    """Runs `megatsp launch`; returns the exit status. train: runs train or sft with its arguments."""
    commands: dict[str, Callable[[list[str]], int]] = {
        "local": lambda rest: _local(rest, train),
        "torchrun": _torchrun,
        "slurm": _slurm,
        "status": _status,
        "logs": _logs,
        "cancel": _cancel,
    }
    where, *rest = arguments or ["--help"]
    if where in ("--help", "-h"):
        print(USAGE, end="")
        return 0
    if where not in commands:
        near = did_you_mean(where, commands)
        raise ValueError(
            f"unknown profile or command of megatsp launch: {where}{near} ({', '.join(commands)})"
        )
    return commands[where](list(rest))


def _local(arguments: list[str], train: Callable[[str, list[str]], int]) -> int:
    command, rest = _command(arguments)
    if command == "preflight":
        raise ValueError("launch local preflight: `megatsp preflight` does that")
    return train(command, rest)


def _torchrun(arguments: list[str]) -> int:
    parser = Parser(
        "megatsp launch torchrun",
        "Runs torchrun here, as one of launch.nodes nodes: the same command on each, but for --node-rank.",
        usage="megatsp launch torchrun [options] [train | sft] [group=choice | key=value ...]",
    )
    parser.add_argument("--node-rank", type=int, default=0, help="this node's number, 0 is the first")
    parser.add_argument(
        "--address", default="", metavar="HOST:PORT", help="of node 0, where all meet; one node needs none"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the command, and stop")
    given, command, overrides = _parse(parser, arguments)
    if command == "preflight":
        raise ValueError("launch torchrun preflight: run `torchrun ... -m megatsp preflight` itself")
    planned = plan(command, overrides, "", "")
    launch = planned.job.config.launch
    if not 0 <= given.node_rank < launch.nodes:
        raise ValueError(
            f"--node-rank {given.node_rank}: launch.nodes={launch.nodes} nodes have 0 to {launch.nodes - 1}"
        )
    if launch.nodes > 1 and not given.address:
        raise ValueError(f"--address is missing: {launch.nodes} nodes meet at HOST:PORT of the first one")
    meeting = (
        ["--standalone"]
        if launch.nodes == 1
        else ["--nnodes", str(launch.nodes), "--node-rank", str(given.node_rank),
              "--rdzv-backend", "static", "--rdzv-endpoint", given.address]
    )  # fmt: skip
    words = [
        sys.executable, "-m", "torch.distributed.run", *meeting, "--nproc-per-node", str(launch.nproc),
        "--max-restarts", str(launch.max_restarts if launch.nodes == 1 else 0),
        "--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", "--shutdown-timeout", "1800",
        "-m", "megatsp", command, *overrides,
    ]  # fmt: skip
    if given.dry_run:
        print(shlex.join(words))
        return 0
    sys.stdout.flush()
    os.execv(words[0], words)


def _slurm(arguments: list[str]) -> int:
    parser = Parser(
        "megatsp launch slurm",
        "Submits a job of launch.nodes (and launch.spare_nodes) nodes, launch.nproc ranks each, which\n"
        "resumes by itself: asked before its time limit, it saves and goes back into the queue; a node that\n"
        "fails is replaced. Keys: megatsp train --help, launch.*",
        usage="megatsp launch slurm [options] [train | sft | preflight] [group=choice | key=value ...]",
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dry-run", action="store_true", help="print the job script, and stop")
    parser.add_argument(
        "--after",
        default="",
        metavar="JOB",
        help="begin after these jobs (1234,1235_0), or afterok:1234 and the like",
    )
    parser.add_argument(
        "--array",
        default="",
        metavar="TASKS",
        help="one job for each number, such as 0-3; %%a in an override is it, and name=...%%a must hold it",
    )
    given, command, overrides = _parse(parser, arguments)
    planned = plan(command, overrides, given.array, given.after)
    if given.dry_run:
        print(script(planned.job), end="")
        return 0
    print(submit(planned))
    return 0


def _parse(parser: Parser, arguments: list[str]) -> tuple[Namespace, str, list[str]]:
    """The options that a parser knows, what is launched, and its arguments, --config-dir among them."""
    parser.add_argument(
        "--config-dir", default="", metavar="FOLDER", help="a folder of yours that is searched for YAML first"
    )
    given, rest = parser.parse_known_args(arguments)
    command, overrides = _command(rest)
    return given, command, [*overrides, *(["--config-dir", given.config_dir] if given.config_dir else [])]


def _command(arguments: list[str]) -> tuple[str, list[str]]:
    """What is launched, train unless it says otherwise, and its arguments."""
    if arguments and "=" not in arguments[0] and not arguments[0].startswith("-"):
        command, *rest = arguments
        if command not in COMMANDS:
            near = did_you_mean(command, COMMANDS)
            raise ValueError(f"megatsp launch cannot run {command}{near}: choose {', '.join(COMMANDS)}")
        return command, rest
    return "train", arguments


def _status(arguments: list[str]) -> int:
    from megatsp.jobs.watch import status

    parser = Parser("megatsp launch status", "The jobs of a run, their attempts, and how far it is.")
    parser.add_argument("what", metavar="RUN_FOLDER_OR_JOB")
    print(status(parser.parse_args(arguments).what))
    return 0


def _logs(arguments: list[str]) -> int:
    from megatsp.jobs.watch import follow, logs

    parser = Parser(
        "megatsp launch logs", "The first failing rank's traceback, then the log of rank 0 and the job's."
    )
    parser.add_argument("what", metavar="RUN_FOLDER_OR_JOB")
    parser.add_argument("--rank", type=int, help="only this rank's log")
    parser.add_argument("--attempt", type=int, help="of the job, 0 is the first (default: the last)")
    parser.add_argument("--lines", type=int, default=40, help="of the end of each log; 0: all (default: 40)")
    parser.add_argument("--follow", action="store_true", help="print what is added, until the job is over")
    given = parser.parse_args(arguments)
    for name in ("rank", "attempt", "lines"):
        if (value := getattr(given, name)) is not None and value < 0:
            raise ValueError(f"--{name} {value}: must be at least 0")
    if not given.follow:
        print(logs(given.what, given.rank, given.attempt, given.lines))
        return 0
    if given.attempt is not None:
        raise ValueError("--follow goes from attempt to attempt: leave --attempt out")
    for text in follow(given.what, given.rank):
        print(text, end="", flush=True)
    return 0


def _cancel(arguments: list[str]) -> int:
    from megatsp.jobs.watch import cancel

    parser = Parser("megatsp launch cancel", "Ends a job for good: after the step that runs and a save.")
    parser.add_argument("what", metavar="RUN_FOLDER_OR_JOB")
    parser.add_argument("--now", action="store_true", help="at once, without a save")
    given = parser.parse_args(arguments)
    print(cancel(given.what, given.now))
    return 0
