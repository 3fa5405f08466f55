"""The computing of one optimizer step, which training and benchmarks share."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatsp.model.gpt import GPT

# ids, labels, mask: this rank's [B, T_local]; first: [B, T] on the CPU, or None. See GPT.__call__.
Batch = tuple[Tensor, Tensor, Tensor, Tensor | None]


def accumulate_gradients(
    gpt: GPT,
    batches: Sequence[Batch],
    loss_tokens: Tensor | float,
    beat: Callable[[str], None] = lambda what: None,
) -> Tensor:
    """Forward and backward of each micro-batch; gradients add up in the parameters.

    loss_tokens: how many tokens carry loss over all ranks, so that each weighs the same.
    beat: called after each micro-batch.
    Returns the local tokens' loss summed by sample, fp32 [micro-batches, B], not yet divided.
    """
    losses = []
    for batch in batches:
        token_losses = gpt(*batch)
        (token_losses.sum() / loss_tokens).backward()
        losses.append(token_losses.detach().sum(1))
        beat("a micro-batch")
    return torch.stack(losses)
