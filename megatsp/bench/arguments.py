"""The arguments of `megatsp bench`."""

import argparse
from pathlib import Path

from megatsp.bench.schemes import DEFAULT_SCHEMES
from megatsp.compose import compose
from megatsp.parser import Parser

USAGE = "megatsp bench [options] [group=choice | group.key=value ...]"
DESCRIPTION = """\
Runs one model by several parallel schemes on this machine and compares them: speed, memory, bytes
moved, waiting, loss. Each measurement has fresh processes; repeats of all schemes alternate. The
overrides are those of `megatsp train`; all schemes do the same global batch.
"""
EPILOG = """\
A SPEC is a preset of configs/parallel, alone or with settings of its own: tp_cp:tp=2 or
tsp:mlp_buckets=8,trainer.recompute_granularity=full (a key without a dot is one of parallel).

examples:
  megatsp bench --world 2
  megatsp bench model=gpt_125m trainer=bf16 --schemes tsp fsdp_cp tp_cp:tp=2 --world 4
  megatsp bench --sweep seq_length=1024,4096,16384 --json bench.json --plot plots --world 2
  megatsp bench --from bench.json --plot plots
  megatsp bench model=llama3_8b trainer.seq_length=131072 --simulate-memory --world 8,64
  megatsp bench model=gpt_7b trainer=bf16 trainer.seq_length=16384 --simulate-memory --fit 192 --world 8
  megatsp bench model=llama3_8b trainer.seq_length=131072 --one-rank --rank 0 --world 64
"""


def run(arguments: list[str]) -> int:
    """Reads the arguments, benchmarks, and returns the exit status.

    Raises:
        ValueError: arguments that make no sense.
    """
    given = _parser().parse_intermixed_args(arguments)
    # A spec has no = before its colon, so an override that follows --schemes is told from one.
    swallowed = [word for word in given.schemes or () if _is_override(word)]
    schemes = [word for word in given.schemes or () if not _is_override(word)]
    overrides = [word for word in arguments if word in {*given.overrides, *swallowed}]
    for word in given.overrides:
        if not _is_override(word):
            raise ValueError(f"{word!r} is no override group.key=value; schemes follow --schemes")
    if given.schemes and not schemes:
        raise ValueError("--schemes: name at least one scheme")
    _check(given, overrides)
    if not given.from_file:  # a mistake in them is told before torch is imported, which takes seconds
        compose(overrides, given.config_dir)

    from megatsp.bench import command
    from megatsp.bench.runner import Settings

    output = command.Output(given.json or "", given.plot)
    if given.from_file:
        return command.show_file(given.from_file, output)
    lone = "simulate" if given.simulate_memory else "one_rank" if given.one_rank else ""
    settings = Settings(
        repeats=0 if lone else given.repeats or 5,
        steps=given.steps or 1,
        warmup=1 if given.warmup is None else given.warmup,
        timeout_s=given.timeout or 600.0,
        memory=lone or ("" if given.no_memory else "ranks"),
        rank=given.rank,
    )
    wanted = command.Wanted(
        overrides, schemes or DEFAULT_SCHEMES, given.world or (), given.sweep or (), given.config_dir
    )
    if given.fit:
        return command.longest(wanted, settings, given.fit)
    return command.bench(wanted, settings, output, ["megatsp", "bench", *arguments])


def _parser() -> Parser:
    parser = Parser(
        "megatsp bench",
        DESCRIPTION,
        usage=USAGE,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("overrides", nargs="*", help=argparse.SUPPRESS)
    names = " ".join(DEFAULT_SCHEMES)
    add("--schemes", nargs="+", action="extend", metavar="SPEC", help=f"what to compare (default: {names})")
    add(
        "--world",
        type=_worlds,
        metavar="N[,N...]",
        help="ranks; several are compared (default: launch.nproc)",
    )
    add(
        "--sweep",
        action="append",
        metavar="KEY=V1,V2",
        help="compare at each value of a key, as in seq_length=1024,4096; several make a product",
    )
    add("--repeats", type=int, metavar="N", help="times that each is measured (default: 5)")
    add("--steps", type=int, metavar="N", help="timed training steps of one measurement (default: 1)")
    add("--warmup", type=int, metavar="N", help="steps before those (default: 1)")
    add("--timeout", type=float, metavar="S", help="seconds that one measurement may take (default: 600)")
    add("--no-memory", action="store_true", help="leave out the runs that follow memory")
    add(
        "--simulate-memory",
        action="store_true",
        help="only memory and bytes moved, by shapes alone: any number of ranks, none is started",
    )
    add(
        "--one-rank",
        action="store_true",
        help="only memory and bytes moved, of one rank on the real device without the others",
    )
    add(
        "--rank",
        type=int,
        metavar="R",
        help="with the two above: which rank (default: the larger of the first and the last)",
    )
    add(
        "--fit",
        type=float,
        metavar="GB",
        help="with --simulate-memory: find the longest seq_length, from the given one up, that fits",
    )
    add("--config-dir", type=Path, metavar="DIR", help="a folder with choices of your own")
    add("--json", metavar="FILE", help="write everything after every measurement; - prints it at the end")
    add("--plot", type=Path, metavar="FOLDER", help="write tokens_per_s.png and peak_memory.png")
    add("--from", dest="from_file", type=Path, metavar="FILE", help="show what --json wrote; measure nothing")
    return parser


def _check(given: argparse.Namespace, overrides: list[str]) -> None:
    """Refuses numbers out of range, and options that others would leave without effect."""
    least = {"repeats": 1, "steps": 1, "warmup": 0, "timeout": 1, "rank": 0}
    for name, lowest in least.items():
        value = getattr(given, name)
        if value is not None and not lowest <= value < float("inf"):
            raise ValueError(f"--{name} {value}: must be at least {lowest}")
    timing = ("repeats", "steps", "warmup", "no_memory")
    measuring = (*timing, "schemes", "world", "sweep", "timeout", "rank", "config_dir")
    lone = ("simulate_memory", "one_rank")
    unused = {
        "from_file": (*measuring, *lone, "fit"),
        "simulate_memory": (*timing, "one_rank"),
        "one_rank": timing,
    }
    for option, others in unused.items():
        for other in others:
            if getattr(given, option) and getattr(given, other) not in (None, False):
                raise ValueError(f"{_flag(option)} does not go with {_flag(other)}")
    if given.from_file and overrides:
        raise ValueError(f"--from does not go with overrides ({overrides[0]}): it measures nothing")
    if given.from_file and given.json not in (None, "-"):
        raise ValueError("--from goes with --json - alone: it would write the same file again")
    if given.fit is not None:
        if not given.simulate_memory:
            raise ValueError("--fit goes with --simulate-memory")
        if not 0 < given.fit < float("inf"):
            raise ValueError(f"--fit {given.fit}: give a rank's memory in GB (10^9 bytes), as in 192")
        for other in ("json", "plot"):
            if getattr(given, other) is not None:
                raise ValueError(f"--fit does not go with --{other}: it prints one table")
    if given.rank is not None and not (given.simulate_memory or given.one_rank):
        raise ValueError("--rank goes with --simulate-memory or --one-rank")


def _flag(name: str) -> str:
    return "--from" if name == "from_file" else "--" + name.replace("_", "-")


def _worlds(text: str) -> list[int]:
    numbers = text.split(",")
    if not all(n.isdecimal() and int(n) > 0 for n in numbers) or len({*map(int, numbers)}) < len(numbers):
        raise argparse.ArgumentTypeError(f"{text!r}: give different numbers of ranks, as in 2 or 2,4")
    return [int(n) for n in numbers]


def _is_override(word: str) -> bool:
    return "=" in word and ":" not in word.partition("=")[0]
