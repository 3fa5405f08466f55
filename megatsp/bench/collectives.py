"""Bytes that one collective moves on this rank, read off its dispatched operation.

As in megatsp.comm: what a gather brings INTO this rank, what a reduction sends OUT of it, (D-1)/D of
the whole; an all-reduce counts as both. So whoever posted it is counted alike: Comm, FSDP2, DTensor.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils._pytree import tree_leaves

NAMESPACES = ("c10d", "_c10d_functional")
# What an operation's name begins with, and what it is called here. Of prefixes that fit the first counts.
_NAMES = {
    "_allgather_base": "all_gather",
    "allgather": "all_gather",
    "all_gather": "all_gather",
    "_reduce_scatter_base": "reduce_scatter",
    "reduce_scatter": "reduce_scatter",
    "allreduce": "all_reduce",
    "all_reduce": "all_reduce",
    "alltoall": "all_to_all",
    "all_to_all": "all_to_all",
    "broadcast": "broadcast",
    "reduce_": "reduce",
    "recv": "send_recv",
}
_MOVE_NOTHING = (
    "send",  # recv counts
    "wait_tensor",
    "_wrap_tensor_autograd",
    "barrier",
    "monitored_barrier_",
    "check_for_nan",
)


def moved_bytes(func: Any, args: tuple[Any, ...], results: Any) -> tuple[str, int]:
    """The collective's name (a value of _NAMES) and its bytes; an operation that moves none: ("", 0).

    func, args, results: of a dispatched operation whose namespace is one of NAMESPACES.

    Raises:
        NotImplementedError: a collective that no step posts so far.
    """
    operation = func.overloadpacket.__name__
    if operation in _MOVE_NOTHING:
        return "", 0
    name = next((name for prefix, name in _NAMES.items() if operation.startswith(prefix)), None)
    if name is None:
        raise NotImplementedError(f"the bytes that {func} moves are not counted: add it to {__file__}")
    if func.namespace == "c10d":  # outputs come before inputs; those in place are both
        tensors = [arg for arg in args if _tensors(arg)]
        outputs, inputs = _tensors(tensors[0]), _tensors(tensors[-1])
    else:
        outputs, inputs = _tensors(results), _tensors(args)
    if name == "all_gather":
        return name, _bytes(outputs) - _bytes(inputs)
    if name == "reduce_scatter":
        return name, _bytes(inputs) - _bytes(outputs)
    if name == "send_recv":
        return name, _bytes(outputs)
    group = _group(args)
    if name in ("broadcast", "reduce"):
        return name, 0 if group.rank() == _root(func, args) else _bytes(inputs)
    size = group.size()
    if name == "all_reduce":
        return name, sum(2 * (t.numel() * (size - 1) // size) * t.element_size() for t in inputs)
    return name, _bytes(inputs) - _kept(operation, args, inputs, group)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _bytes(tensors: list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _group(args: tuple[Any, ...]) -> dist.ProcessGroup:
    for arg in args:
        if isinstance(arg, torch.ScriptObject):
            return dist.ProcessGroup.unbox(arg)
    return _resolve_process_group(args[-1])  # functional collectives end with the group's name


def _root(func: Any, args: tuple[Any, ...]) -> int:
    names = [argument.name for argument in func._schema.arguments]
    return args[names.index("root_rank" if "root_rank" in names else "src")]


def _kept(operation: str, args: tuple[Any, ...], inputs: list[Tensor], group: dist.ProcessGroup) -> int:
    """Bytes of an all-to-all's input that stay on this rank."""
    if operation == "alltoall_":  # a tensor a rank
        return _bytes([inputs[group.rank()]])
    splits = args[4] if operation == "alltoall_base_" else args[2]
    (whole,) = inputs
    if not splits:
        return _bytes(inputs) // group.size()
    return splits[group.rank()] * _bytes(inputs) // whole.shape[0] if whole.shape[0] else 0
