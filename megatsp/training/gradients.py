"""Loss and gradients of one global batch, as all ranks know them, before anything is done with them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatsp.comm import Traffic
from megatsp.model.gpt import GPT
from megatsp.training.optimizer import gradient_norm
from megatsp.training.ranks import sum_over_ranks
from megatsp.training.step import Batch, accumulate_gradients


@dataclass(frozen=True)
class Computed:
    """Gradients are in the parameters, not clipped.

    losses: of this rank's samples, fp32 [micro-batches, B]. loss, norm: of the global batch. norm is a scalar
    where the model is. sums: over ranks, of what each gave along.
    """

    losses: Tensor
    loss: float
    norm: Tensor
    grad_norm: float
    sums: list[float]

    @property
    def is_finite(self) -> bool:
        """The same on all ranks: they are sums over all."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def compute_gradients(
    gpt: GPT,
    batches: Sequence[Batch],
    given: Sequence[float],
    waits: Traffic,
    beat: Callable[[str], None],
) -> Computed:
    """On all ranks. given: numbers of this rank that are summed along with the loss.

    Raises:
        PeerError: another rank did not send what it owed.
    """
    # How many tokens carry loss, over all ranks: so each token weighs the same.
    own = torch.stack([mask.sum(dtype=torch.float64) for _, _, mask, _ in batches]).sum()
    loss_tokens = sum_over_ranks(own, waits).clamp(min=1).float()
    losses = accumulate_gradients(gpt, batches, loss_tokens, beat)
    mine = losses.sum(dtype=torch.float64) / loss_tokens
    found = torch.stack([mine, *(mine.new_tensor(number) for number in given)])
    loss, *sums = sum_over_ranks(found, waits).tolist()
    norm = gradient_norm(gpt)
    grad_norm = norm.item()
    gpt.engine.check()  # what a rank did not send is NaN: say that first
    return Computed(losses, loss, norm, grad_norm, sums)


def drop_gradients(gpt: GPT) -> None:
    """As if the step had not been computed."""
    for parameter in gpt.parameters():
        parameter.grad = None
