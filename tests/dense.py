"""The reference every parallel result is compared with: a dense GPT in one process, in plain torch.

It imports nothing of megatsp, spells attention out as a T x T matrix, and follows the
operation order of Hugging Face's Llama, Mistral, Qwen2, Qwen3, SmolLM3 and OLMo2, whose
parameter names it bears. Norms, softmax and loss are computed in fp32, or in fp64 for an fp64 model;
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
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 0.0


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
    qk_layernorm_width: str = "head"
    norm_position: str = "before"
    no_rope_freq: int = 0
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
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)  # in the original context
    if scaling.type == "yarn":
        return yarn_blend(c, frequencies)
    assert scaling.type == "llama3", scaling.type
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = ((turns - low) / (high - low)).clamp(0, 1)  # few turns: divided by factor; many turns: kept
    return keep * frequencies + (1 - keep) * frequencies / scaling.factor


def yarn_blend(c: DenseConfig, frequencies: Tensor) -> Tensor:
    """Fast pairs keep their frequency, slow ones have it divided, those between are blended by their index.

    Source: Peng et al., arXiv:2309.00071, section 3.2; as in transformers the borders are whole indices.
    """
    scaling, pairs = c.rotary_scaling, len(frequencies)
    # base^(-i / pairs) = 2 pi turns / length, solved for i.
    fast, slow = (
        -pairs * math.log(2 * math.pi * turns / scaling.original_max_position_embeddings, c.rotary_base)
        for turns in (scaling.beta_fast, scaling.beta_slow)
    )
    low, high = max(math.floor(fast), 0), min(math.ceil(slow), 2 * pairs - 1)
    blended = []
    for i, frequency in enumerate(frequencies):
        share = (i - low) / (high - low) if high > low else float(i > low)
        share = min(max(share, 0.0), 1.0)
        blended.append(frequency * (1 - share) + frequency / scaling.factor * share)
    return torch.stack(blended)


def rotary_gain(c: DenseConfig) -> float:
    """YaRN's factor of rotated queries and keys."""
    scaling = c.rotary_scaling
    if scaling.type != "yarn":
        return 1.0
    return scaling.attention_factor if scaling.attention_factor > 0 else 1 + math.log(scaling.factor) / 10


def rotate(x: Tensor, frequencies: Tensor, gain: float) -> Tensor:
    """Rotates channel pairs (i, i + d/2) of x [B, heads, T, d] by position * frequency, times `gain`."""
    angles = torch.arange(x.shape[-2])[:, None] * frequencies  # [T, d/2]
    cos, sin = ((f(angles) * gain).to(x.dtype).repeat(1, 2) for f in (torch.cos, torch.sin))  # [T, d]
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


class Attention(nn.Module):
    def __init__(self, c: DenseConfig, rotary: bool) -> None:
        super().__init__()
        h, d, H, K = c.hidden_size, c.kv_channels, c.num_attention_heads, c.num_query_groups
        self.q_proj = nn.Linear(h, H * d, bias=c.add_qkv_bias)
        self.k_proj = nn.Linear(h, K * d, bias=c.add_qkv_bias)
        self.v_proj = nn.Linear(h, K * d, bias=c.add_qkv_bias)
        self.o_proj = nn.Linear(H * d, h, bias=False)
        self.all_heads = c.qk_layernorm_width == "all"
        widths = (H * d, K * d) if self.all_heads else (d, d)
        self.q_norm, self.k_norm = (
            RMSNorm(width, c.norm_epsilon) if c.qk_layernorm else nn.Identity() for width in widths
        )
        self.config, self.rotary = c, rotary

    def forward(self, x: Tensor) -> Tensor:
        def heads(y: Tensor) -> Tensor:  # [B, T, heads * d] to [B, heads, T, d]
            return y.unflatten(-1, (-1, self.config.kv_channels)).transpose(1, 2)

        q, k, v = self.q_proj(x), self.k_proj(x), heads(self.v_proj(x))
        if self.all_heads:
            q, k = heads(self.q_norm(q)), heads(self.k_norm(k))
        else:
            q, k = self.q_norm(heads(q)), self.k_norm(heads(k))
        if self.rotary:
            frequencies, gain = rotary_frequencies(self.config), rotary_gain(self.config)
            q, k = rotate(q, frequencies, gain), rotate(k, frequencies, gain)
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
    def __init__(self, c: DenseConfig, index: int) -> None:
        super().__init__()
        self.before = c.norm_position == "before"
        if self.before:
            self.input_layernorm = RMSNorm(c.hidden_size, c.norm_epsilon)
        self.self_attn = Attention(c, rotary=not c.no_rope_freq or (index + 1) % c.no_rope_freq > 0)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.norm_epsilon)
        self.mlp = MLP(c)
        if not self.before:
            self.post_feedforward_layernorm = RMSNorm(c.hidden_size, c.norm_epsilon)

    def forward(self, x: Tensor) -> Tensor:
        if self.before:
            x = x + self.self_attn(self.input_layernorm(x))
            return x + self.mlp(self.post_attention_layernorm(x))
        x = x + self.post_attention_layernorm(self.self_attn(x))
        return x + self.post_feedforward_layernorm(self.mlp(x))


class Decoder(nn.Module):
    def __init__(self, c: DenseConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.Sequential(*(Layer(c, i) for i in range(c.num_layers)))
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
