"""What one rank finds, all ranks say: errors agreed on, so that none waits for another that has gone."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from megatsp.checkpoint.manifest import Damaged

T = TypeVar("T")


def group_rank(group: dist.ProcessGroup | None) -> int:
    """This rank's number in the group (None: of all); 0 in a process without ranks."""
    return dist.get_rank(group) if dist.is_initialized() else 0


def on_each(work: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
    """Does `work` on every rank and gives all of them every rank's result, in the order of ranks.

    Raises:
        Damaged: `work` did, on some rank; with its message, on every rank.
        ValueError: likewise.
        RuntimeError: `work` raised anything else there.
    """
    outcome: tuple[T | None, Exception | None]
    try:
        outcome = work(), None
    except Exception as error:  # whatever it is, the others must not wait for it
        outcome = None, error
    outcomes: list[Any] = [outcome]
    if dist.is_initialized():
        outcomes = [None] * dist.get_world_size(group)
        dist.all_gather_object(outcomes, outcome, group=group)
    failures = {rank: error for rank, (_, error) in enumerate(outcomes) if error is not None}
    if failures:
        raise combined(failures) from outcome[1]
    return [result for result, _ in outcomes]


def on_first(work: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """What `work` returns on the first rank of the group, which alone does it, on all of them.

    Raises:
        Damaged: `work` did; with its message, on every rank.
        ValueError: likewise.
        RuntimeError: `work` raised anything else.
    """
    outcome: list[Any] = [None, None]
    if group_rank(group) == 0:
        try:
            outcome[0] = work()
        except Exception as error:  # whatever it is, the others must not wait for it
            outcome[1] = error
    if dist.is_initialized():
        first = dist.get_global_rank(group, 0) if group is not None else 0
        dist.broadcast_object_list(outcome, src=first, group=group)
    result, failure = outcome
    if isinstance(failure, ValueError):
        raise (Damaged if isinstance(failure, Damaged) else ValueError)(str(failure)) from failure
    if failure is not None:
        raise RuntimeError(f"rank 0: {type(failure).__name__}: {failure}") from failure
    found: T = result
    return found


def from_checkpoint_exception(error: CheckpointException) -> Exception:
    """What torch's distributed checkpoint raises on all ranks, which is no Exception, as one that is."""
    return combined({rank: failure for rank, (failure, _) in error.failures.items()})


def combined(failures: dict[int, BaseException]) -> Exception:
    """One error of several ranks': Damaged if one is, or else ValueError if one is, or else RuntimeError."""
    kinds = (Damaged, ValueError)
    kind = next((k for k in kinds if any(isinstance(e, k) for e in failures.values())), RuntimeError)
    chosen = {
        rank: error for rank, error in failures.items() if kind is RuntimeError or isinstance(error, kind)
    }
    texts: dict[str, int] = {}
    for rank, error in sorted(chosen.items()):
        text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        texts.setdefault(text, rank)
    shown = "; ".join(f"rank {rank}: {text}" for text, rank in list(texts.items())[:4])
    return kind(shown + (f"; and {len(texts) - 4} more" if len(texts) > 4 else ""))
