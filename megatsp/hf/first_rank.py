"""What one rank does for all, while the others wait."""

from collections.abc import Callable

import torch.distributed as dist


def on_first_rank(work: Callable[[], object]) -> None:
    """Does `work` on rank 0 alone, or in a process without ranks; all go on when it is done.

    Raises:
        ValueError: `work` did; with its message, on every rank.
        RuntimeError: on the other ranks, if `work` raised anything else.
    """
    if not dist.is_initialized():
        work()
        return
    failure: Exception | None = None
    if dist.get_rank() == 0:
        try:
            work()
        except Exception as error:  # whatever it is, the others must not wait for it
            failure = error
    box = [(isinstance(failure, ValueError), str(failure)) if failure is not None else None]
    dist.broadcast_object_list(box, src=0)
    if failure is not None:
        raise failure
    if box[0] is not None:
        is_users, text = box[0]
        raise ValueError(text) if is_users else RuntimeError(f"rank 0 failed: {text}")
