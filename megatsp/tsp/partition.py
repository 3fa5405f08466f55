"""The zigzag partition of a sequence over D ranks.

The sequence is cut into 2D chunks; rank p holds chunks p and 2D-1-p. Under a causal
mask every rank then has the same work. Source: The Llama 3 Herd of Models,
arXiv:2407.21783, section 3.3.2.
"""

import torch
from torch import Tensor


def take_local(tokens: Tensor, rank: int, size: int, dim: int = 1) -> Tensor:
    """The two chunks of `rank`: [.., T, ..] to [.., T/D, ..] along `dim`.

    Raises:
        ValueError: if 2D does not divide T.
    """
    length = tokens.shape[dim]
    if length % (2 * size):
        raise ValueError(f"a sequence of {length} tokens does not split into 2 x {size} chunks")
    chunks = tokens.chunk(2 * size, dim)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]], dim)


def local_positions(length: int, rank: int, size: int, device: torch.device) -> Tensor:
    """Global positions of the tokens that `rank` holds: int64 [T/D]."""
    return take_local(torch.arange(length, device=device), rank, size, dim=0)


def to_global(shards: Tensor) -> Tensor:
    """Shards in rank order to the sequence in order: [D, .., T/D, d] to [.., T, d]."""
    size = shards.shape[0]
    low, high = shards.unflatten(-2, (2, -1)).unbind(-3)  # of all ranks: chunks 0..D-1, and 2D-1..D
    chunks = low.new_empty(*low.shape[1:-2], 2 * size, *low.shape[-2:])
    chunks[..., :size, :, :] = low.movedim(0, -3)
    chunks[..., size:, :, :] = high.flip(0).movedim(0, -3)
    return chunks.flatten(-3, -2)


def to_shards(whole: Tensor, size: int) -> Tensor:
    """The inverse of to_global: [.., T, d] to [D, .., T/D, d]."""
    chunks = whole.unflatten(-2, (2 * size, -1)).movedim(-3, 0)
    shards = chunks.new_empty(size, *chunks.shape[1:-2], 2, *chunks.shape[-2:])
    shards[..., 0, :, :] = chunks[:size]
    shards[..., 1, :, :] = chunks[size:].flip(0)
    return shards.flatten(-3, -2)
