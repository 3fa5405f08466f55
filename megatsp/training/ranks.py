"""What a run's ranks tell each other, and where their batches go."""

import torch
import torch.distributed as dist
from torch import Tensor

from megatsp.comm import Traffic
from megatsp.data.loader import HostBatch
from megatsp.training.step import Batch


def sum_over_ranks(tensor: Tensor, waits: Traffic | None = None) -> Tensor:
    """Every rank's part, summed in place on all. waits: adds up how long this rank waits for others."""
    work = dist.all_reduce(tensor, async_op=True)
    (waits or Traffic()).wait([work], tensor.is_cuda)
    return tensor


def from_first(text: str) -> str:
    """Rank 0's text, on all."""
    box = [text]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_device(batch: HostBatch, device: torch.device) -> Batch:
    """The batch where the model is; `first` stays on the host, where documents are planned."""
    *tensors, first = batch
    ids, labels, mask = (tensor.to(device, non_blocking=True) for tensor in tensors)
    return ids, labels, mask, first
