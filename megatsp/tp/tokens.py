"""Whose tokens a tensor-parallel rank has: its own around norms and residuals, the group's inside.

Attention, MLP and head compute on all tokens of the group with 1/tp of the weights: the tokens are
gathered before, and the partial results summed and scattered after. They travel in the dtype in
which they were computed: bf16 sums are rounded on the way, as in Megatron-LM.

Source: Korthikanti et al., Reducing Activation Recomputation, arXiv:2205.05198, section 4.2.2.
"""

import torch
from torch import Tensor

from megatsp.comm import Comm, Pending


class GroupTokens:
    """The tokens of one tp group, in rank order: [B, T_local, ..] each, [B, T_local tp, ..] together."""

    def __init__(self, comm: Comm) -> None:
        self.comm = comm

    def gather(self, own: Tensor, label: str) -> Pending:
        """Every rank's own tokens to all ranks."""
        if self.comm.size == 1:
            return Pending(own)
        return self.comm.all_gather(own[None], label).then(lambda all_: all_.movedim(0, 1).flatten(1, 2))

    def reduce_scatter(self, partial: Tensor, label: str) -> Pending:
        """The sum over ranks of partial results for all tokens, of which each rank gets its own's."""
        if self.comm.size == 1:
            return Pending(partial)
        by_rank = partial.unflatten(1, (self.comm.size, -1)).movedim(1, 0)
        # Not a view: autograd and FSDP2 take none as a module's output.
        unwrap = torch.ops.aten._unsafe_view
        return self.comm.reduce_scatter(by_rank, label).then(lambda own: unwrap(own, own.shape[1:]))

    def own(self, tokens: Tensor) -> Tensor:
        """This rank's own of [B, T_local tp, ..]."""
        return tokens.chunk(self.comm.size, 1)[self.comm.rank]

    def combine(self, lse: Tensor, target_logits: Tensor) -> tuple[Tensor, Tensor]:
        """Log-sum-exp and target logits [N], each over a rank's share of the vocabulary, over all of it.

        A target's logit is 0 on the ranks that do not hold its row.
        """
        if self.comm.size == 1:
            return lse, target_logits
        shares = self.comm.all_gather(torch.stack([lse, target_logits])[None], "head/loss").wait()
        return shares[:, 0].logsumexp(0), shares[:, 1].sum(0)
