"""Rotary position embedding, in the rotate-half convention of Hugging Face checkpoints.

Source: Su et al., arXiv:2104.09864; linear scaling: Chen et al., arXiv:2306.15595;
Llama 3 scaling: Meta's llama-models, as in transformers' rope utilities.
"""

import math

import torch
from torch import Tensor

from megatsp.schema import ModelConfig


def inverse_frequencies(model: ModelConfig) -> Tensor:
    """Angle per token of each of the d/2 pairs: fp32 [d/2]."""
    exponents = torch.arange(0, model.kv_channels, 2, dtype=torch.float32) / model.kv_channels
    frequencies = 1.0 / model.rotary_base**exponents
    scaling = model.rotary_scaling
    if scaling.type == "none":
        return frequencies
    if scaling.type == "linear":
        return frequencies / scaling.factor
    assert scaling.type == "llama3"
    # Short wavelengths stay, long ones are divided by the factor, those between are blended.
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0.0, 1.0)
    return keep * frequencies + (1 - keep) * frequencies / scaling.factor


def rotary_table(model: ModelConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines at `positions` [.., T]: two fp32 [.., T, d/2]."""
    angles = positions.float()[..., None] * inverse_frequencies(model).to(positions.device)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False, out: Tensor | None = None) -> Tensor:
    """Rotates the pairs (i, i + d/2) of x [B, H, T, d] by a `rotary_table`'s angles; computed in fp32.

    cos, sin: [T, d/2], or [B, 1, T, d/2] where the samples' positions differ.
    inverse: by the negative angles, which is the backward. out: another tensor to write into.
    """
    out = torch.empty_like(x) if out is None else out
    first, second = x.float().chunk(2, dim=-1)
    signs = (1, -1) if inverse else (-1, 1)
    for target, a, b, sign in zip(out.chunk(2, -1), (first, second), (second, first), signs, strict=True):
        if target.dtype == torch.float32:
            torch.mul(a, cos, out=target).addcmul_(b, sin, value=sign)
        else:
            target.copy_((a * cos).addcmul_(b, sin, value=sign))
    return out
