"""The command `megatsp`: what the arguments ask for, in this process or in ranks it starts."""

import os
import signal
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, MutableMapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megatsp import __version__, launcher
from megatsp.nearest import did_you_mean
from megatsp.parser import Parser
from megatsp.schema import AXES, Config

if TYPE_CHECKING:
    from megatsp.training.stopping import Stopper

USAGE = """\
usage: megatsp COMMAND [arguments]

  train      train a GPT                         megatsp train --help
  sft        tune a Hugging Face checkpoint      megatsp sft --help
  launch     train here, or as a Slurm job       megatsp launch --help
  generate   continue a text with a trained GPT  megatsp generate --help
  bench      compare ways to run a GPT           megatsp bench --help
  preprocess tokenise texts to train on          megatsp preprocess --help
  data       look at what a training reads       megatsp data --help
  convert    from and to Hugging Face            megatsp convert --help
  ckpt       look at, check, move checkpoints    megatsp ckpt --help
  report     one HTML page of a run              megatsp report --help
  doctor     find what is wrong with machines    megatsp doctor --help
  preflight  measure the machines before a run   megatsp preflight --help

  --version  print the version
  --help     print this text
"""


# What the ranks of these commands import first: once, for all that our launcher starts.
_WORK = {
    "train": "megatsp.training.run", "sft": "megatsp.training.run", "generate": "megatsp.training.generate",
    "preflight": "megatsp.preflight.rank",
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit status; a user's mistake is one message and 2."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        launcher.become_rank([_WORK[name] for name in arguments[:1] if name in _WORK])
        if _join(os.environ):
            launcher.run_rank(lambda: _dispatch(arguments))
        status = _dispatch(arguments)
        sys.stdout.flush()
        return status
    except ValueError as error:
        if not launcher.is_users(error):
            raise
        print(f"megatsp: error: {error}", file=sys.stderr)
        return launcher.USER_ERROR
    except KeyboardInterrupt:
        return launcher.INTERRUPTED
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _dispatch(arguments: list[str]) -> int:
    commands: dict[str, Callable[[list[str]], int]] = {
        "train": partial(_train, "train"), "sft": partial(_train, "sft"), "generate": _generate,
        "bench": _bench, "preprocess": _preprocess, "data": _data, "convert": _convert,
        "ckpt": _ckpt, "report": _report, "doctor": _doctor, "preflight": _preflight,
        "launch": _launch_command,
    }  # fmt: skip
    name, *rest = arguments or ["--help"]
    if name in ("--help", "-h"):
        print(USAGE, end="")
    elif name == "--version":
        print(f"megatsp {__version__}")
    elif name in commands:
        return commands[name](rest)
    else:
        near = did_you_mean(name, commands)
        raise ValueError(f"unknown command {name}{near} (commands: {', '.join(commands)})")
    return 0


def _train(name: str, arguments: list[str]) -> int:
    """`megatsp train` and `megatsp sft`, which begin with a primary configuration of their name."""
    parser = Parser(f"megatsp {name}", add_help=False)
    parser.add_argument("--help", "-h", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--show-mesh")
    parser.add_argument("--config-dir", type=Path)
    parser.add_argument("overrides", nargs="*")
    whole = [
        "--show-mesh=" if text == "--show-mesh" else text for text in arguments
    ]  # an override may follow
    given = parser.parse_intermixed_args(whole)
    given.describes = given.dry_run or given.show_mesh is not None  # and starts nothing
    if given.show_mesh and not given.show_mesh.endswith(".png"):
        raise ValueError(f"--show-mesh={given.show_mesh}: give a file that ends with .png, or none")
    if given.help:
        from megatsp.help import training_help

        print(training_help(name), end="")
        return 0

    from megatsp.training.stopping import Stopper

    if "RANK" in os.environ:
        with Stopper() as stopper:  # before modules are loaded
            return _train_as(name, arguments, given, stopper)
    with nullcontext() if given.describes else launcher.requeued():
        return _train_as(name, arguments, given, None)


def _train_as(name: str, arguments: list[str], given: Namespace, stopper: "Stopper | None") -> int:
    """stopper: of a rank, which a launcher has started."""
    from megatsp.cluster import start
    from megatsp.compose import compose
    from megatsp.validate import validate

    config = compose(given.overrides, given.config_dir, name)
    world_size = start.world_size(config, os.environ, given.describes)
    config = validate(config, world_size)
    is_first = stopper is None or os.environ["RANK"] == "0"
    if given.describes:
        if is_first:
            _describe(config, world_size, given)
        return 0
    lines = start.enter(config, os.environ)
    lines += start.placement_lines(config, start.ranks_per_node(config, os.environ))
    has_printed = launcher.LAUNCHER_PID in os.environ and launcher.ATTEMPT_FOLDER not in os.environ
    if is_first and not has_printed:  # that is, a launcher that ran this function too
        _say(lines)
    if stopper is None:
        restarts = launcher.Restarts(
            config.launch.max_restarts, config.launch.restart_backoff_s, partial(_newest, config)
        )
        return _launch(config.launch.nproc, [name, *arguments], restarts)
    from megatsp.training.run import train

    return train(config, stopper)


def _describe(config: Config, world_size: int, given: Namespace) -> None:
    """What --dry-run and --show-mesh print of a validated configuration."""
    from megatsp.cluster import draw, start

    if given.dry_run:
        from megatsp.compose import to_yaml
        from megatsp.training.report import describe

        print(to_yaml(config))
        _say(start.apply_profile(config, dict(os.environ)))
        print(describe(config, world_size))
    if given.show_mesh is not None:
        ranks = start.ranks_per_node(config, os.environ) or world_size
        sizes = {axis: getattr(config.parallel, axis) for axis in AXES}
        print(draw.mesh_text(sizes, ranks))
        _say(start.placement_lines(config, ranks))
        if given.show_mesh:
            draw.draw_mesh(sizes, ranks, Path(given.show_mesh))
            print(given.show_mesh)


def _say(lines: Iterable[str]) -> None:
    for line in lines:
        print(line, flush=True)


def _newest(config: Config) -> int:
    """The iteration of a run's newest checkpoint; -1 if there is none, or none can be read."""
    from megatsp.checkpoint.paths import LATEST, read_pointer

    iteration = read_pointer(Path(config.output_dir) / config.name / "checkpoints" / LATEST)
    return -1 if iteration is None else iteration


def _generate(arguments: list[str]) -> int:
    parser = Parser("megatsp generate", description="Continues a text with a checkpoint of a run.")
    parser.add_argument("run_folder", type=Path, metavar="RUN_FOLDER", help="<output_dir>/<name> of a run")
    text = "last, best (of the lowest validation loss) or an iteration (default: last)"
    parser.add_argument("--checkpoint", default="last", metavar="WHICH", help=text)
    parser.add_argument("--base", default="", metavar="HF", help="what a run's adapters tune, if it moved")
    parser.add_argument("--prompt", default="", help="the text to continue (default: none)")
    parser.add_argument("--tokens", type=int, default=200, help="how many to generate (default: 200)")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0 takes the likeliest token (default: 0.8)"
    )
    parser.add_argument("--seed", type=int, default=1234, help="of the random choices (default: 1234)")
    parser.add_argument("--nproc", type=int, default=1, help="local ranks to start (default: 1)")
    given = parser.parse_args(arguments)
    if not given.run_folder.is_dir():
        raise ValueError(f"no run folder {given.run_folder}; give the <output_dir>/<name> of a trained run")
    for name in ("tokens", "nproc"):
        if getattr(given, name) < 1:
            raise ValueError(f"--{name} {getattr(given, name)}: must be at least 1")
    if given.checkpoint not in ("last", "best") and not given.checkpoint.isdecimal():
        raise ValueError(f"--checkpoint {given.checkpoint}: give last, best or an iteration")
    if not 0 <= given.seed < 2**63:
        raise ValueError(f"--seed {given.seed}: must be in [0, 2^63)")
    if not given.prompt.isascii() and any("\ud800" <= c <= "\udfff" for c in given.prompt):
        raise ValueError("--prompt is not valid UTF-8")
    if not 0 <= given.temperature < float("inf"):
        raise ValueError(f"--temperature {given.temperature}: must be in [0, inf)")
    if "RANK" not in os.environ:
        return _launch(given.nproc, ["generate", *arguments])

    from megatsp.training.generate import main as generate

    settings = given.prompt, given.tokens, given.temperature, given.seed
    generate(given.run_folder, given.checkpoint, given.base, *settings)
    return 0


def _bench(arguments: list[str]) -> int:
    from megatsp.bench.arguments import run

    if "RANK" in os.environ:
        raise ValueError("megatsp bench starts ranks of its own: start it without torchrun or srun")
    return run(arguments)


def _preprocess(arguments: list[str]) -> int:
    from megatsp.data.preprocess.arguments import run

    if "RANK" in os.environ:
        raise ValueError("megatsp preprocess starts workers of its own: start it without torchrun or srun")
    return run(arguments)


def _data(arguments: list[str]) -> int:
    from megatsp.data.inspect.command import run

    if "RANK" in os.environ:
        raise ValueError("megatsp data needs no ranks: start it without torchrun or srun")
    return run(arguments)


def _convert(arguments: list[str]) -> int:
    from megatsp.hf.command import run

    if "RANK" in os.environ:
        raise ValueError("megatsp convert is one process: start it without torchrun or srun")
    return run(arguments)


def _ckpt(arguments: list[str]) -> int:
    from megatsp.ckpt.command import run

    if "RANK" in os.environ:
        raise ValueError("megatsp ckpt is one process: start it without torchrun or srun")
    return run(arguments)


def _report(arguments: list[str]) -> int:
    from megatsp.report.command import run

    if "RANK" in os.environ:
        raise ValueError("megatsp report is one process: start it without torchrun or srun")
    return run(arguments)


def _doctor(arguments: list[str]) -> int:
    from megatsp.doctor.command import run

    return run(arguments)


def _launch_command(arguments: list[str]) -> int:
    from megatsp.jobs.command import run

    if "RANK" in os.environ:
        raise ValueError("megatsp launch starts jobs: start it without torchrun or srun")
    return run(arguments, _train)


def _preflight(arguments: list[str]) -> int:
    from megatsp.preflight.command import composed, parse

    given = parse(arguments)
    if "RANK" in os.environ:
        from megatsp.preflight.rank import run

        return run(given)
    from megatsp.cluster import start
    from megatsp.validate import validate

    config = composed(given)
    if given.folder is not None:
        raise ValueError(
            "--folder is for the ranks of a job: leave it out, or start them by srun or torchrun"
        )
    validate(config, config.launch.nproc)
    start.enter(config, os.environ)  # whose libraries read some of it as they are loaded
    return _launch(config.launch.nproc, ["preflight", *arguments])


def _launch(nproc: int, arguments: list[str], restarts: launcher.Restarts | None = None) -> int:
    return launcher.launch_local(nproc, [sys.executable, "-m", "megatsp", *arguments], restarts)


def _join(environment: MutableMapping[str, str]) -> bool:
    """Whether torchrun, srun or our launcher started this process as a rank.

    For a task of srun it sets torchrun's variables; a batch script, which has no step, is no task.
    """
    if "RANK" not in environment:
        is_ours = "MEGATSP_NPROC" in environment  # a job of `megatsp launch`, which may have one rank
        if "SLURM_STEP_ID" not in environment:
            return False
        if int(environment.get("SLURM_NTASKS", "1")) < 2 and not is_ours:
            return False
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if name not in environment:
                fix = "export MASTER_ADDR=$(scontrol show hostnames | head -n1) MASTER_PORT=29500 before srun"
                raise ValueError(f"srun started this rank, but {name} is not set; {fix}")
        environment["RANK"] = environment["SLURM_PROCID"]
        environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
        environment["WORLD_SIZE"] = environment["SLURM_NTASKS"]
    if "WORLD_SIZE" not in environment:
        raise ValueError(
            "RANK is set but WORLD_SIZE is not; start the ranks by torchrun, srun or launch.nproc"
        )
    return True
