"""What the start of a run takes from where it runs: how many ranks, on which nodes, in which environment."""

import sys
from collections.abc import Iterator, Mapping, MutableMapping

from megatsp.cluster.mesh import placement_errors, placement_warnings
from megatsp.cluster.profiles import apply, load_profile
from megatsp.schema import AXES, Config

_THREADS = "OMP_NUM_THREADS"


def world_size(config: Config, environ: Mapping[str, str], describes: bool) -> int:
    """Ranks of the whole job: those that a launcher started, or else those that are to start.

    describes: nothing starts, so all nodes may be meant; otherwise this machine alone is.

    Raises:
        ValueError: there are several nodes, and no launcher, or one that started other ranks.
    """
    launch = config.launch
    wanted = launch.nodes * launch.nproc
    if "RANK" not in environ:
        if launch.nodes > 1 and not describes:
            raise ValueError(
                f"launch.nodes={launch.nodes}: megatsp train and sft start ranks on this machine alone; use "
                "`megatsp launch slurm` or `megatsp launch torchrun`, or launch.nodes=1"
            )
        return wanted
    started = int(environ["WORLD_SIZE"])
    if launch.nodes > 1 and started != wanted:
        raise ValueError(
            f"launch.nodes={launch.nodes} x launch.nproc={launch.nproc} = {wanted} ranks, but the launcher "
            f"started WORLD_SIZE={started}; start {wanted}, or give the nodes and ranks a node that there are"
        )
    return started


def ranks_per_node(config: Config, environ: Mapping[str, str]) -> int:
    """Ranks of each node as the launcher says it, or the configuration; 0 where neither knows."""
    if "RANK" not in environ or config.launch.nodes > 1:
        return config.launch.nproc
    return int(environ.get("LOCAL_WORLD_SIZE", "0"))


def apply_profile(config: Config, environ: MutableMapping[str, str]) -> list[str]:
    """Sets what launch.profile says and the user has not; lines for the log of what is effective.

    Raises:
        ValueError: there is no such profile, or its file is not one.
    """
    return [f"environment: {line}" for line in apply(load_profile(config.launch.profile), environ)]


def enter(config: Config, environ: MutableMapping[str, str]) -> list[str]:
    """`apply_profile` to this process, which may have loaded torch: that has read some of it already."""
    was_set = _THREADS in environ
    lines = apply_profile(config, environ)
    threads = environ.get(_THREADS, "").partition(",")[0]
    if not was_set and threads.isdecimal() and "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(int(threads))
    return lines


def placement_lines(config: Config, ranks: int) -> Iterator[str]:
    """What is slow about the mesh of a validated configuration on nodes of so many ranks; 0: not known."""
    if ranks:
        sizes = {axis: getattr(config.parallel, axis) for axis in AXES}
        for line in [*placement_errors(sizes, ranks), *placement_warnings(sizes, ranks)]:
            yield f"warning: {line}"
