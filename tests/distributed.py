"""Runs a function on several gloo ranks of this machine, for tests; see megatsp/bench/ranks.py.

Ranks live through the session: a pool of each size answers call after call, with torch and this project
imported once and the process groups of each mesh made once. A call starts as on a new rank: with the parent's
environment, folder, sys.path and warning filters, and generators seeded. Ranks that failed, or that a call
left in another state than it found, are replaced. A test that interrupts ranks, or that patches what is not
ours, asks for `fresh` ones.
"""

import atexit
import functools
import random
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import ProcessGroupGloo, distributed_c10d
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from waiting import LIMIT_S

from megatsp import axes
from megatsp.bench.ranks import PRELOAD, Kind, Ranks, RanksFailedError, interrupts_wait, run_ranks

_PRELOAD = (*PRELOAD, "pytest", "transformers", "triton", "megatsp.training.run", "megatsp.hf.load")
_MOST_RANKS = 14  # of one test process, which keeps the sizes used last
_FIRST_SEED = torch.initial_seed()  # of a process that has seeded nothing

_pools: dict[int, Ranks] = {}  # by number of ranks, the one used last at the end


def run_distributed(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = LIMIT_S, fresh: bool = False
) -> list[Any]:
    """Calls fn(*args) on every rank, the default process group initialised, and returns their results.

    The parent's environment, working directory, sys.path and warning filters (so: warnings
    are errors) hold in the ranks. A rank has one thread, a fresh one its share of the cores.

    Args:
        fn: a function at the top level of a module, which the ranks import.
        world_size: number of ranks.
        args: pickled, so that ranks share no memory with the parent or with each other.
        timeout_s: seconds after which all ranks are killed.
        fresh: whether the ranks are new, and end with the call.

    Returns: what fn returned, pickled, in the order of ranks.

    Raises:
        AssertionError: a rank raised or died; its number and traceback are in the message.
        TimeoutError: some ranks have not returned in time; their numbers are in the message.
    """
    try:
        if fresh:
            return run_ranks(fn, world_size, *args, timeout_s=timeout_s, preload=_PRELOAD)
        return _call_pool(fn, world_size, args, timeout_s)
    except RanksFailedError as error:
        raise AssertionError(str(error)) from error


def _call_pool(fn: Callable[..., Any], world_size: int, args: tuple[Any, ...], timeout_s: float) -> list[Any]:
    with interrupts_wait() as interrupts:
        pool = _pools.pop(world_size, None)
        while sum(_pools) + world_size > _MOST_RANKS:
            _pools.pop(next(iter(_pools))).close()
        if pool is None:
            pool = Ranks(Kind(world_size), group_timeout_s=2 * LIMIT_S, preload=_PRELOAD)
        is_clean = False
        try:
            interrupts.let_in()
            found = pool.call(_call, fn, args, timeout_s=timeout_s)
            is_clean = all(was_clean for _, was_clean in found)
        finally:
            interrupts.wait = True
            if is_clean:
                _pools[world_size] = pool
            else:
                pool.close()
    return [result for result, _ in found]


@atexit.register
def close_pools() -> None:
    """Ends all ranks of this process."""
    while _pools:
        _pools.popitem()[1].close()


# What follows runs on the ranks.


def _call(fn: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, bool]:
    """What fn returns, and whether it left this rank as it was."""
    _destroy_groups()
    torch.set_num_threads(1)
    distributed_c10d.ProcessGroupGloo = _Gloo  # type: ignore[misc]
    axes.init_device_mesh = _mesh  # type: ignore[assignment]
    axes.DeviceMesh = _mesh_of_ranks  # type: ignore[assignment,misc]
    torch.manual_seed(_FIRST_SEED)
    np.random.seed(0)
    random.seed(0)
    before, modules = _state(), _modules()
    result = fn(*args)
    return result, before == _state() and _are_unpatched(modules)


class _Gloo(ProcessGroupGloo):
    """A group on the one device of its process.

    gloo has a thread for each device, which looks for work 100 times a second. With a device for each group
    that is kept, these threads were most of what two cores could do.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: Any) -> None:
        options = ProcessGroupGloo._Options()
        options._devices, options._timeout = [_device()], timeout
        super().__init__(store, rank, size, options)


@functools.cache
def _device() -> Any:
    return ProcessGroupGloo.create_default_device()


_kept: set[str] = set()  # names of the groups of meshes that are kept


def _destroy_groups() -> None:
    """Ends the groups that the last call made beside the kept meshes': no other rank is in it any more."""
    for group in list(distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD and group.group_name not in _kept:
            dist.destroy_process_group(group)


def _keep_groups(make: Callable[[], DeviceMesh]) -> DeviceMesh:
    before = {group.group_name for group in distributed_c10d._world.pg_map}
    mesh = make()
    _kept.update({group.group_name for group in distributed_c10d._world.pg_map} - before)
    return mesh


@functools.cache
def _mesh(device_type: str, sizes: tuple[int, ...], mesh_dim_names: tuple[str, ...]) -> DeviceMesh:
    mesh = _keep_groups(lambda: init_device_mesh(device_type, sizes, mesh_dim_names=mesh_dim_names))
    flattened = _keep_groups(lambda: mesh["cp", "tsp"]._flatten("sequence"))
    assert flattened.size() == mesh["cp"].size() * mesh["tsp"].size()
    return mesh


_meshes_of_ranks: dict[Any, DeviceMesh] = {}


def _mesh_of_ranks(device_type: str, ranks: torch.Tensor, mesh_dim_names: tuple[str, ...]) -> DeviceMesh:
    key = (device_type, ranks.shape, tuple(ranks.flatten().tolist()), mesh_dim_names)
    if key not in _meshes_of_ranks:
        _meshes_of_ranks[key] = _keep_groups(
            lambda: DeviceMesh(device_type, ranks, mesh_dim_names=mesh_dim_names)
        )
    return _meshes_of_ranks[key]


def _state() -> tuple[Any, ...]:
    """What a call must leave as it was."""
    signals = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    children = Path(f"/proc/self/task/{threading.main_thread().native_id}/children").read_text()
    options = torch.get_default_dtype(), torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled()
    group = dist.group.WORLD if dist.is_initialized() else None
    return group, threading.active_count(), children, signals, options


def _modules() -> dict[str, dict[str, Any]]:
    """The names of each module of ours, and their values."""
    return {
        name: dict(vars(module))
        for name, module in list(sys.modules.items())
        if name.split(".")[0] in ("megatsp", "megatsp_kernels")
    }


def _are_unpatched(before: dict[str, dict[str, Any]]) -> bool:
    """Whether every name that was there has its value yet; more may have been imported."""
    now = _modules()
    return all(now[name].get(key) is value for name in before for key, value in before[name].items())
