"""The arguments of `megatsp preflight`, which measures what a run will do, where it would run."""

from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

from megatsp.parser import Parser
from megatsp.preflight.files import NODES
from megatsp.schema import Config

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
    from megatsp.compose import compose

    return compose(given.overrides, given.config_dir, "sft" if given.sft else "train")
