"""The arguments of `megatsp data inspect`, and what it prints."""

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from megatsp.compose import compose
from megatsp.data.blend import Blend, Draw
from megatsp.data.inspect.plot import plot_lengths
from megatsp.data.inspect.show import BRACKETS, COLOURS, Speller, show_sample
from megatsp.data.inspect.statistics import (
    measure,
    measured_lines,
    num_measured,
    source_lengths,
    source_lines,
)
from megatsp.data.splits import load_splits
from megatsp.data.tokenizer import load_tokenizer
from megatsp.nearest import did_you_mean
from megatsp.parser import Parser
from megatsp.schema import Config, ParallelConfig
from megatsp.validate import validate

SPLITS = ("train", "valid", "test")
BROKEN_PIPE = 141  # 128 + SIGPIPE: what a shell reports of a program whose reader has gone

USAGE = """\
usage: megatsp data COMMAND [arguments]

  inspect    show the samples of a run, and statistics  megatsp data inspect --help
"""


def run(arguments: list[str]) -> int:
    """`megatsp data`: returns the exit status.

    Raises:
        ValueError: a user's mistake.
    """
    commands = {"inspect": _inspect}
    name, *rest = arguments or ["--help"]
    if name in ("--help", "-h"):
        print(USAGE, end="")
        return 0
    if name not in commands:
        near = did_you_mean(name, commands)
        raise ValueError(f"unknown command data {name}{near} (commands: {', '.join(commands)})")
    return commands[name](rest)


def _inspect(arguments: list[str]) -> int:
    parser = Parser(
        "megatsp data inspect",
        description="Shows samples exactly as training reads them, in its order, with statistics and a "
        "histogram of the documents' lengths. NO_COLOR=1 marks what is trained without colours.",
    )
    parser.add_argument("overrides", nargs="*", metavar="group=choice|key=value", help="as of megatsp train")
    parser.add_argument("--config-dir", type=Path, help="as of megatsp train")
    parser.add_argument("--sft", action="store_true", help="the settings are those of megatsp sft")
    parser.add_argument("--samples", type=int, default=3, help="how many to show (default: 3)")
    parser.add_argument("--at", type=int, default=0, metavar="SAMPLE", help="the first of them (default: 0)")
    parser.add_argument(
        "--split",
        choices=SPLITS,
        default="train",
        help="whose; valid and test: the samples of an evaluation (default: train)",
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="the histogram (default: <output_dir>/<name>-data.png)"
    )
    given = parser.parse_intermixed_args(arguments)
    for option in ("samples", "at"):
        if getattr(given, option) < 0:
            raise ValueError(f"--{option} {getattr(given, option)}: must be at least 0")
    if given.plot and given.plot.suffix != ".png":
        raise ValueError(f"--plot {given.plot}: give a file that ends with .png")
    config = compose(given.overrides, given.config_dir, "sft" if given.sft else "train")
    # Which samples are read, and in which order, does not depend on the ranks: so this asks for none.
    config = validate(replace(config, parallel=ParallelConfig()), world_size=1)
    try:
        inspect(config, given.split, given.samples, given.at, given.plot, sys.stdout.write, os.environ)
        sys.stdout.flush()
    except BrokenPipeError:  # of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        return BROKEN_PIPE
    return 0


@dataclass(frozen=True)
class _Order:
    """The samples of a split as they are read: `draws(begin, count)`, and how many are of each source."""

    draws: Callable[[int, int], list[Draw]]
    length: int | None  # None: endless
    read: list[float]
    reader: str


def inspect(
    config: Config,
    split: str,
    num_samples: int,
    at: int,
    plot: Path | None,
    write: Callable[[str], object],
    environment: Mapping[str, str],
) -> None:
    """Writes samples at .. at + num_samples - 1 of the split's order, statistics, and the histogram.

    Args:
        config: validated.
        plot: the histogram's file; None: <output_dir>/<name>-data.png.

    Raises:
        ValueError: data that cannot be read, a split that is not there, or `at` beyond its end.
    """
    tokenizer = load_tokenizer(config.data.tokenizer)
    blend = getattr(load_splits(config, tokenizer), split)
    if blend is None:
        raise ValueError(
            f"there is no {split} split: set data.{split}_fraction above 0, or data.{split}_path"
        )
    order = _order(config, split, blend)
    if order.length is not None and at >= order.length:
        raise ValueError(f"--at {at}: {order.reader} reads the samples 0 to {order.length - 1}")

    coloured = sys.stdout.isatty() and not environment.get("NO_COLOR")
    style, speller = COLOURS if coloured else BRACKETS, Speller(tokenizer)
    encoding = sys.stdout.encoding or "utf-8"

    def say(line: str) -> None:
        write(f"{line}\n".encode(encoding, "backslashreplace").decode(encoding))

    if num_samples:
        say(f"{style.legend}\n")
    for place, draw in enumerate(order.draws(at, num_samples), at):
        for line in show_sample(blend, draw, place, config.data.packing == "concat", speller, style):
            say(line)
        say("")

    lengths = [source_lengths(source) for source in blend.sources]
    for line in source_lines(blend, order.read, lengths, order.reader):
        say(line)
    draws = order.draws(at, min(len(blend), num_measured(config.trainer.seq_length)))
    for line in measured_lines(measure(blend, draws), at):
        say(line)
    path = plot or Path(config.output_dir, f"{config.name}-data.png")
    names = {
        f"{i}: {source.name}" if len(lengths) > 1 else source.name: i
        for i, source in enumerate(blend.sources)
    }
    plot_lengths(
        {name: lengths[i] for name, i in names.items()},
        config.trainer.seq_length,
        path,
        f"data of {config.name}",
    )
    say(f"lengths of documents: {path}")


def _order(config: Config, split: str, blend: Blend) -> _Order:
    trainer = config.trainer
    if split == "train":
        consumed = trainer.train_iters * trainer.global_batch_size
        read = [source.epochs(consumed) * len(source.samples) for source in blend.sources]
        return _Order(blend.draw, None, read, "the run")
    spread = blend.spread(trainer.eval_iters * trainer.global_batch_size)
    read = [float(sum(draw.source == i for draw in spread)) for i in range(len(blend.sources))]
    return _Order(lambda begin, count: spread[begin : begin + count], len(spread), read, "an evaluation")
