"""The reference every parallel result is compared with: a dense GPT in one process, in plain torch.

It imports nothing of megatsp, spells attention out as a T x T matrix, and follows the
operation order of Hugging Face's Llama, Mistral, Qwen2 and Qwen3, whose parameter names
it bears. Norms, softmax and loss are computed in fp32, or in fp64 for an fp64 model;
rotary angles always in fp32, as there.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class DenseScaling:
    """Fields as in megatsp.schema.RotaryScaling."""

    type: str = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class DenseConfig:
    """Fields as in megatsp.schema.ModelConfig, which serves as well."""

    num_layers: int = 2
    hidden_size: int = 48
    ffn_hidden_size: int = 80
    num_attention_heads: int = 6
    num_query_groups: int = 2
    kv_channels: int = 8
    vocab_size: int = 67
    rotary_base: float = 10000.0
    rotary_scaling: DenseScaling = field(default_factory=DenseScaling)
    norm_epsilon: float = 1e-5
    add_qkv_bias: bool = False
    qk_layernorm: bool = False
    untie_embeddings_and_output_weights: bool = False


def wide(x: Tensor) -> Tensor:
    """x in fp32, or unchanged if it is fp64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.Module):
    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        y = wide(x)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.epsilon)
        return self.weight * y.to(x.dtype)


def rotary_frequencies(c: DenseConfig) -> Tensor:
    """Angle per position of each pair of channels, [d/2].

    Source: Su et al., arXiv:2104.09864, eq. 15; the llama3 scaling is that of Llama 3.1's release.
    """
    frequencies = 1.0 / c.rotary_base ** (torch.arange(0, c.kv_channels, 2).float() / c.kv_channels)
    scaling = c.rotary_scaling
    if scaling.type == "none":
        return frequencies
    if scaling.type == "linear":
        return frequencies / scaling.factor
    assert scaling.type == "llama3", scaling.type
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)  # in the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = ((turns - low) / (high - low)).clamp(0, 1)  # few turns: divided by factor; many turns: kept
    return keep * frequencies + (1 - keep) * frequencies / scaling.factor


def rotate(x: Tensor, frequencies: Tensor) -> Tensor:
    """Rotates channel pairs (i, i + d/2) of x [B, heads, T, d] by position * frequency."""
    angles = torch.arange(x.shape[-2])[:, None] * frequencies  # [T, d/2]
    cos, sin = (f(angles).to(x.dtype).repeat(1, 2) for f in (torch.cos, torch.sin))  # [T, d]
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


class Attention(nn.Module):
    def __init__(self, c: DenseConfig) -> None:
        super().__init__()
        h, d, H, K = c.hidden_size, c.kv_channels, c.num_attention_heads, c.num_query_groups
        self.q_proj = nn.Linear(h, H * d, bias=c.add_qkv_bias)
        self.k_proj = nn.Linear(h, K * d, bias=c.add_qkv_bias)
        self.v_proj = nn.Linear(h, K * d, bias=c.add_qkv_bias)
        self.o_proj = nn.Linear(H * d, h, bias=False)
        self.q_norm = RMSNorm(d, c.norm_epsilon) if c.qk_layernorm else nn.Identity()
        self.k_norm = RMSNorm(d, c.norm_epsilon) if c.qk_layernorm else nn.Identity()
        self.config = c

    def forward(self, x: Tensor) -> Tensor:
        def heads(y: Tensor) -> Tensor:  # [B, T, heads * d] to [B, heads, T, d]
            return y.unflatten(-1, (-1, self.config.kv_channels)).transpose(1, 2)

        frequencies = rotary_frequencies(self.config)
        q = rotate(self.q_norm(heads(self.q_proj(x))), frequencies)
        k = rotate(self.k_norm(heads(self.k_proj(x))), frequencies)
        v = heads(self.v_proj(x))
        k, v = (
            y.repeat_interleave(q.shape[1] // y.shape[1], dim=1) for y in (k, v)
        )  # one for each query head

        scores = wide(q @ k.transpose(-1, -2)) / math.sqrt(q.shape[-1])  # [B, H, T, T]
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, -math.inf).softmax(-1).to(x.dtype)
        return self.o_proj((weights @ v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, c: DenseConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.ffn_hidden_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.ffn_hidden_size, bias=False)
        self.down_proj = nn.Linear(c.ffn_hidden_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, c: DenseConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.norm_epsilon)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.norm_epsilon)
        self.mlp = MLP(c)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, c: DenseConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.Sequential(*(Layer(c) for _ in range(c.num_layers)))
        self.norm = RMSNorm(c.hidden_size, c.norm_epsilon)

    def forward(self, ids: Tensor) -> Tensor:
        return self.norm(self.layers(self.embed_tokens(ids)))


class DenseGPT(nn.Module):
    """ids [B, T] to logits [B, T, V]. A tied head has no parameter of its own."""

    def __init__(self, c: DenseConfig) -> None:
        super().__init__()
        self.model = Decoder(c)
        if c.untie_embeddings_and_output_weights:
            self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        head = self.lm_head if hasattr(self, "lm_head") else self.model.embed_tokens
        return F.linear(self.model(ids), head.weight)

    def loss(self, ids: Tensor, labels: Tensor, mask: Tensor, first: Tensor | None = None) -> Tensor:
        """Mean cross-entropy over the tokens where mask is 1; ids, labels, mask: [B, T].

        first: [B, T], the position of the first token of each token's document. Every document is then run
            by itself.
        """
        losses = self.document_losses(ids, labels, first) if first is not None else self.losses(ids, labels)
        weights = mask.to(losses.dtype)
        return (losses * weights).sum() / weights.sum()

    def losses(self, ids: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of every token, [B, T]."""
        logits = wide(self(ids)).flatten(0, 1)
        return F.cross_entropy(logits, labels.flatten(), reduction="none").view(ids.shape)

    def document_losses(self, ids: Tensor, labels: Tensor, first: Tensor) -> Tensor:
        """The same of samples packed with documents, one run of the model for each."""
        samples = []
        for sample in range(len(ids)):
            lengths = first[sample].unique_consecutive(return_counts=True)[1].tolist()
            documents = zip(ids[sample].split(lengths), labels[sample].split(lengths), strict=True)
            samples.append(torch.cat([self.losses(own[None], its[None])[0] for own, its in documents]))
        return torch.stack(samples)
