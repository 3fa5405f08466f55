"""Embedding sharded over the residual width: ids are gathered, columns looked up, one all-to-all.

Each rank holds [V, h/D] and looks up its columns for ALL tokens of the group, [D, B, T/D, h/D];
the all-to-all sends every rank its own tokens' columns. The backward is the way back.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatsp.comm import Comm


def embed(ids: Tensor, weight: Tensor, comm: Comm, dtype: torch.dtype) -> Tensor:
    """Embeddings of the local tokens.

    Args:
        ids: int64 [B, T/D], this rank's tokens; weight: [V, h/D], this rank's columns.
    Returns:
        [B, T/D, h] in `dtype`.
    """
    return _Embed.apply(weight, ids, comm, dtype)


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, comm: Comm, dtype: torch.dtype) -> Tensor:
        all_ids = comm.all_gather(ids[None].int(), "embedding/ids").wait()  # [D, B, T/D]
        columns = torch.nn.functional.embedding(all_ids, weight).to(dtype)  # [D, B, T/D, h/D]
        ctx.save_for_backward(all_ids)
        ctx.comm, ctx.rows, ctx.weight_dtype = comm, weight.shape[0], weight.dtype
        if comm.size == 1:  # not a view, which FSDP2 does not take as a module's output
            return torch.ops.aten._unsafe_view(columns, columns.shape[1:])
        arrived = comm.all_to_all(columns, "embedding/forward").wait()  # [D(of h), B, T/D, h/D]
        return arrived.movedim(0, 2).flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        (all_ids,) = ctx.saved_tensors
        parts = dout.unflatten(2, (ctx.comm.size, -1)).movedim(2, 0)
        columns = ctx.comm.all_to_all(parts, "embedding/backward").wait()
        dweight = torch.ops.aten.embedding_dense_backward(columns.float(), all_ids, ctx.rows, -1, False)
        return dweight.to(ctx.weight_dtype), None, None, None
