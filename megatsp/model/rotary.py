"""Rotary position embedding, in the rotate-half convention of Hugging Face checkpoints.

Source: Su et al., arXiv:2104.09864; linear scaling: Chen et al., arXiv:2306.15595;
Llama 3 scaling: Meta's llama-models, as in transformers' rope utilities; YaRN: Peng et al., arXiv:2309.00071,
with the borders between its ranges rounded to whole pairs, as there.
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
    if scaling.type == "yarn":
        keep, divided = _yarn_kept(model), 1.0 / (scaling.factor * model.rotary_base**exponents)
        return divided * (1 - keep) + frequencies * keep
    assert scaling.type == "llama3"
    # Short wavelengths stay, long ones are divided by the factor, those between are blended.
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0.0, 1.0)
    return keep * frequencies + (1 - keep) * frequencies / scaling.factor


def _yarn_kept(model: ModelConfig) -> Tensor:
    """Which share of each pair's frequency YaRN keeps: fp32 [d/2], 1 for the fastest, then falling to 0."""
    scaling, d = model.rotary_scaling, model.kv_channels

    def pair_of(turns: float) -> float:
        """The (fractional) pair that turns so often in the original context."""
        length = scaling.original_max_position_embeddings
        return d * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(model.rotary_base))

    first = max(math.floor(pair_of(scaling.beta_fast)), 0)
    last = min(math.ceil(pair_of(scaling.beta_slow)), d - 1)
    width = last - first if last != first else 0.001
    return 1 - ((torch.arange(d // 2, dtype=torch.float32) - first) / width).clamp(0, 1)


def attention_factor(model: ModelConfig) -> float:
    """What YaRN multiplies cosines and sines by, so queries and keys; 1 for the others."""
    scaling = model.rotary_scaling
    if scaling.type != "yarn":
        return 1.0
    return scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1


def rotary_table(model: ModelConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines at `positions` [.., T], times `attention_factor`: two fp32 [.., T, d/2]."""
    angles = positions.float()[..., None] * inverse_frequencies(model).to(positions.device)
    cos, sin = angles.cos(), angles.sin()
    factor = attention_factor(model)
    return (cos, sin) if factor == 1 else (cos.mul_(factor), sin.mul_(factor))


def rotate(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False, out: Tensor | None = None) -> Tensor:
    """Rotates the pairs (i, i + d/2) of x [B, H, T, d] by a `rotary_table`'s angles; computed in fp32.

    cos, sin: [T, d/2], or [B, 1, T, d/2] where the samples' positions differ.
    inverse: by the negative angles: the transpose, so the backward, for a scaled table too.
    out: another tensor to write into.
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
