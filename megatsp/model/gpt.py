"""The network: a decoder-only GPT of the Llama family.

    x = embedding(ids)
    each layer:  x += attention(norm(x));  x += mlp(norm(x))      or, with norm_position=after (OLMo2),
                 x += norm(attention(x));  x += norm(mlp(x))
    logits = head(norm(x))

Attention: rotary (but in every no_rope_freq-th layer: SmolLM3), grouped-query, optional biases on
q, k, v (Qwen2), optional RMSNorm of q and k, over each head (Qwen3) or over all (OLMo2). MLP:
SwiGLU. Parameters have the names and logical shapes of a Hugging Face state dict. They are declared
here with plain torch modules and computed with by the `stream` objects that parallelize.py
attaches: how weights and tokens are spread is not said here.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from megatsp.cp.documents import Documents
from megatsp.model.rotary import rotary_table
from megatsp.schema import MATRICES, FinetuneConfig, ModelConfig
from megatsp.tsp.attention import HeadVectors, Positions
from megatsp.tsp.head import StreamedHead
from megatsp.tsp.layer import LayerTensors, StreamedLayer
from megatsp.tsp.lora import AdapterPair

# An adapter's two modules in that of its matrix, named as in PEFT.
ADAPTER = ("lora_A", "lora_B")


class Attention(nn.Module):
    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        h, d = model.hidden_size, model.kv_channels
        query, kv = model.num_attention_heads * d, model.num_query_groups * d
        self.q_proj = nn.Linear(h, query, bias=model.add_qkv_bias)
        self.k_proj = nn.Linear(h, kv, bias=model.add_qkv_bias)
        self.v_proj = nn.Linear(h, kv, bias=model.add_qkv_bias)
        self.o_proj = nn.Linear(query, h, bias=False)
        q_width, k_width = (query, kv) if model.qk_layernorm_width == "all" else (d, d)
        self.q_norm = nn.RMSNorm(q_width, model.norm_epsilon) if model.qk_layernorm else None
        self.k_norm = nn.RMSNorm(k_width, model.norm_epsilon) if model.qk_layernorm else None


class MLP(nn.Module):
    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(model.hidden_size, model.ffn_hidden_size, bias=False)
        self.up_proj = nn.Linear(model.hidden_size, model.ffn_hidden_size, bias=False)
        self.down_proj = nn.Linear(model.ffn_hidden_size, model.hidden_size, bias=False)


class DecoderLayer(nn.Module):
    stream: StreamedLayer

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        before = model.norm_position == "before"
        if before:
            self.input_layernorm = nn.RMSNorm(model.hidden_size, model.norm_epsilon)
        self.self_attn = Attention(model)
        self.post_attention_layernorm = nn.RMSNorm(model.hidden_size, model.norm_epsilon)
        self.mlp = MLP(model)
        if not before:
            self.post_feedforward_layernorm = nn.RMSNorm(model.hidden_size, model.norm_epsilon)

    @property
    def norms(self) -> tuple[nn.RMSNorm, nn.RMSNorm]:
        """Attention's and the MLP's: of what they read, or of what they give."""
        if hasattr(self, "input_layernorm"):
            return self.input_layernorm, self.post_attention_layernorm
        return self.post_attention_layernorm, self.post_feedforward_layernorm

    def tensors(self) -> LayerTensors:
        """This rank's shards, as autograd should see them."""
        a, m = self.self_attn, self.mlp
        projections = (a.q_proj, a.k_proj, a.v_proj)
        biases = [local(p.bias) for p in projections if p.bias is not None]
        gains = [local(norm.weight) for norm in (a.q_norm, a.k_norm) if norm is not None]
        return LayerTensors(
            attention=[local(p.weight) for p in (*projections, a.o_proj)],
            mlp=[local(p.weight) for p in (m.gate_proj, m.up_proj, m.down_proj)],
            gains=[local(norm.weight) for norm in self.norms],
            vectors=HeadVectors.of([*biases, *gains], bool(biases), bool(gains)),
            adapters=[
                AdapterPair(number, *(local(matrix.get_parameter(f"{side}.weight")) for side in ADAPTER))
                for number, matrix in enumerate(self.matrices())
                if hasattr(matrix, ADAPTER[0])
            ],
        )

    def matrices(self) -> list[nn.Linear]:
        """In the order of MATRICES."""
        a, m = self.self_attn, self.mlp
        return [a.q_proj, a.k_proj, a.v_proj, a.o_proj, m.gate_proj, m.up_proj, m.down_proj]

    def forward(
        self,
        x: Tensor,
        positions: Positions,
        following: Callable[[], None] | None,
        preceding: Callable[[], None] | None,
    ) -> Tensor:
        return self.stream(x, self.tensors(), positions, following, preceding)


class TokenEmbedding(nn.Embedding):
    """lookup: ids and this rank's part of the matrix to the embeddings of the local tokens."""

    lookup: Callable[[Tensor, Tensor], Tensor]

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:  # there torch imports its compiler, for seconds, to draw nothing
            super().reset_parameters()

    def forward(self, ids: Tensor) -> Tensor:
        return self.lookup(ids, local(self.weight))


class OutputHead(nn.Linear):
    """An output head with a matrix of its own; loss: see `StreamedHead`."""

    loss: StreamedHead

    def forward(  # type: ignore[override]  # it gives losses, never logits
        self, x: Tensor, labels: Tensor, mask: Tensor, gain: Tensor, preceding: Callable[[], None] | None
    ) -> Tensor:
        return self.loss(x, labels, mask, gain, local(self.weight), preceding)


class Decoder(nn.Module):
    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = TokenEmbedding(model.vocab_size, model.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(model) for _ in range(model.num_layers))
        self.norm = nn.RMSNorm(model.hidden_size, model.norm_epsilon)


class GPT(nn.Module):
    """The whole model on this rank's tokens.

    engine: gives positions, a tied head and prefetches; see parallelize.Engine.
    """

    engine: Any

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.config = model
        self.model = Decoder(model)
        untied = model.untie_embeddings_and_output_weights
        self.lm_head = OutputHead(model.hidden_size, model.vocab_size, bias=False) if untied else None

    @property
    def head_weight(self) -> Tensor:
        """[V, h]: the output head's own, or the embedding's."""
        return (self.lm_head or self.model.embed_tokens).weight

    def layer(self, index: int) -> DecoderLayer:
        layer = self.model.layers[index]
        assert isinstance(layer, DecoderLayer)
        return layer

    def __call__(
        self,
        ids: Tensor,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        first: Tensor | None = None,
    ) -> Tensor:
        """ids: int64 [B, T_local], this rank's share (`Axes.take_local`); labels and mask likewise.

        first: int64 [B, T] of the WHOLE sequence, on the CPU: for each position that of the first token of
            its document, which alone is seen from it. None: a sample is one document.
        Returns each local token's loss times its mask, fp32 [B, T_local]; without labels the last
        layer's output [B, T_local, h], before the final norm.
        """
        # Not in forward: FSDP2 takes tensors to the GPU before that, and the host would wait for them.
        documents = None if first is None else self.engine.documents(ids, first)
        return super().__call__(ids, labels, mask, documents)

    def forward(
        self, ids: Tensor, labels: Tensor | None, mask: Tensor | None, documents: Documents | None
    ) -> Tensor:
        """See `__call__`."""
        engine, layers = self.engine, self.model.layers
        at = engine.positions(ids, documents)
        positions = Positions(*rotary_table(self.config, at), documents)
        still = positions.without_rotary() if self.config.no_rope_freq else positions
        x = self.model.embed_tokens(ids)
        for i, layer in enumerate(layers):
            where = positions if has_rotary(self.config, i) else still
            x = layer(x, where, engine.after_forward(i, labels is not None), engine.after_backward(i))
        if labels is None:
            return x
        gain, preceding = local(self.model.norm.weight), engine.after_backward(len(layers))
        if self.lm_head is not None:
            return self.lm_head(x, labels, mask, gain, preceding)
        return engine.head(x, labels, mask, gain, local(self.head_weight), preceding)


def local(parameter: Tensor) -> Tensor:
    """This rank's shard of a parameter, connected to its gradient."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def add_adapters(gpt: GPT, finetune: FinetuneConfig) -> None:
    """Freezes all parameters, and gives the layers' matrices finetune.lora_targets adapters to train.

    Does nothing if finetune.lora_rank is 0.

    A [r, in] and B [out, r] are named as in PEFT, `q_proj.lora_A.weight`. What they compute: tsp/lora.py.
    """
    rank = finetune.lora_rank
    if not rank:
        return
    gpt.requires_grad_(False)
    for index in range(gpt.config.num_layers):
        for name, matrix in zip(MATRICES, gpt.layer(index).matrices(), strict=True):
            if name in finetune.lora_targets:
                matrix.lora_A = nn.Linear(matrix.in_features, rank, bias=False)
                matrix.lora_B = nn.Linear(rank, matrix.out_features, bias=False)


def has_rotary(model: ModelConfig, index: int) -> bool:
    """Whether layer `index`, counted from 0, turns queries and keys by their positions."""
    return model.no_rope_freq == 0 or (index + 1) % model.no_rope_freq != 0


def count_parameters(model: ModelConfig) -> int:
    """Number of parameters; a tied matrix counts once."""
    with torch.device("meta"):
        return sum(p.numel() for p in GPT(model).parameters())


def adapter_shapes(model: ModelConfig, finetune: FinetuneConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the adapters' parameters by name; none if finetune.lora_rank is 0."""
    with torch.device("meta"):
        gpt = GPT(model)
        add_adapters(gpt, finetune)
    return {name: tuple(p.shape) for name, p in gpt.named_parameters() if ".lora_" in name}
