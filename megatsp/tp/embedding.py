"""Embedding cut over the vocabulary: each rank looks up the ids it holds, for all tokens of the group."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatsp.tp.tokens import GroupTokens


def embed_vocabulary_parallel(
    ids: Tensor, weight: Tensor, tokens: GroupTokens, first_row: int, dtype: torch.dtype
) -> Tensor:
    """Embeddings of the local tokens.

    Args:
        ids: int64 [B, T_local]; weight: [V/tp, h], the rows from `first_row`.
    Returns:
        [B, T_local, h] in `dtype`.
    """
    return _Embed.apply(weight, ids, tokens, first_row, dtype)


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, ids: Tensor, tokens: GroupTokens, first_row: int, dtype: torch.dtype
    ) -> Tensor:
        rows = tokens.gather(ids.int(), "embedding/ids").wait() - first_row
        inside = (rows >= 0) & (rows < weight.shape[0])
        rows = torch.where(inside, rows, 0)
        partial = torch.nn.functional.embedding(rows, weight).to(dtype) * inside[..., None]
        ctx.save_for_backward(rows, inside)
        ctx.tokens, ctx.num_rows, ctx.weight_dtype = tokens, weight.shape[0], weight.dtype
        # One rank has a token's row and the others add zeros: exact in any dtype.
        return tokens.reduce_scatter(partial, "embedding/forward").wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        rows, inside = ctx.saved_tensors
        everyone = ctx.tokens.gather(dout, "embedding/backward").wait()
        everyone = everyone.float() * inside[..., None]
        dweight = torch.ops.aten.embedding_dense_backward(everyone, rows, ctx.num_rows, -1, False)
        return dweight.to(ctx.weight_dtype), None, None, None, None
