"""What one rank does for all, while the others wait."""

from collections.abc import Callable

import torch.distributed as dist


def on_first_rank(work: Callable[[], object]) -> None:
    """Does `work` on rank 0 alone, or in a process without ranks; all go on when it is done.

    Raises:
        ValueError: `work` did; with its message, on every rank.
    """
    if not dist.is_initialized():
        work()
        return
    box: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            work()
        except ValueError as error:
            box = [str(error)]
    dist.broadcast_object_list(box, src=0)
    if box[0] is not None:
        raise ValueError(box[0])
