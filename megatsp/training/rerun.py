"""The same step once more, bit for bit: whether bad numbers come from the data or from a machine."""

import hashlib
import socket
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from megatsp.model.gpt import GPT
from megatsp.training.gradients import Computed, drop_gradients


@dataclass(frozen=True)
class Bits:
    """Digests of what this rank computed: its micro-batches' losses, and its shards of the gradients."""

    losses: str
    gradients: str

    @classmethod
    def of(cls, gpt: GPT, losses: Tensor) -> "Bits":
        """Of gradients that are not clipped yet: that would spread one rank's number to all."""
        digest = hashlib.blake2b()
        for parameter in gpt.parameters():
            if parameter.grad is not None:
                _update(digest, parameter.grad)  # one at a time: a copy of all may not fit
        of_losses = hashlib.blake2b()
        _update(of_losses, losses)
        return cls(of_losses.hexdigest(), digest.hexdigest())


@dataclass(frozen=True)
class Rerun:
    """computed: the second time; its gradients are in the parameters. suspects: hosts by rank; {}: none."""

    computed: Computed
    suspects: dict[int, str]

    @property
    def line(self) -> str:
        """What the log says of it."""
        found = "finite now" if self.computed.is_finite else "not finite again"
        if not self.suspects:
            return f" the same step gave the same bits again, {found}: the data or the weights, not a machine"
        who = ", ".join(f"rank {rank} on {host}" for rank, host in self.suspects.items())
        return f" the same step gave other bits, {found}: hardware is suspected: {who}"


def rerun(gpt: GPT, first: Computed, again: Callable[[], Computed]) -> Rerun:
    """Computes a step again, on all ranks, and holds its bits against the first time's.

    again: computes it from the same batches and weights.
    """
    before = Bits.of(gpt, first.losses)
    drop_gradients(gpt)
    computed = again()
    after = Bits.of(gpt, computed.losses)
    own = (before.losses != after.losses, before.gradients != after.gradients, socket.gethostname())
    everywhere: list[tuple[bool, bool, str]] = [(False, False, "")] * dist.get_world_size()
    dist.all_gather_object(everywhere, own)
    # A wrong number of one rank is in the gradients of those that sum it: who lost something first is named.
    column = 0 if any(losses for losses, _, _ in everywhere) else 1
    return Rerun(computed, {rank: found[2] for rank, found in enumerate(everywhere) if found[column]})


def _update(digest: "hashlib.blake2b", tensor: Tensor) -> None:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    digest.update(local.detach().contiguous().view(torch.uint8).cpu().numpy().tobytes())
