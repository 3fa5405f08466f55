"""Runs a function on several gloo ranks of this machine, for tests; see megatsp/bench/ranks.py."""

from collections.abc import Callable
from typing import Any

from waiting import LIMIT_S

from megatsp.bench.ranks import PRELOAD, RanksFailedError, run_ranks


def run_distributed(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = LIMIT_S
) -> list[Any]:
    """Calls fn(*args) on every rank, the default process group initialised, and returns their results.

    The parent's environment, working directory, sys.path and warning filters (so: warnings
    are errors) hold in the ranks. Each rank gets its share of the cores.

    Args:
        fn: a function at the top level of a module, which the ranks import.
        world_size: number of ranks.
        args: pickled, so that ranks share no memory with the parent or with each other.
        timeout_s: seconds after which all ranks are killed.

    Returns: what fn returned, pickled, in the order of ranks.

    Raises:
        AssertionError: a rank raised or died; its number and traceback are in the message.
        TimeoutError: some ranks have not returned in time; their numbers are in the message.
    """
    try:
        return run_ranks(fn, world_size, *args, timeout_s=timeout_s, preload=[*PRELOAD, "pytest"])
    except RanksFailedError as error:
        raise AssertionError(str(error)) from error
