"""The same model without megatsp's layers, on one rank: what parallel schemes cost where nothing is parallel.

`plain` is eager torch with autograd and scaled_dot_product_attention; `transformers` is Hugging Face's
Llama with its sdpa attention. Both start from our first weights, so their losses must be ours.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from megatsp.bench.step import TrainStep
from megatsp.model.gpt import GPT, Attention, DecoderLayer, has_rotary
from megatsp.model.rotary import rotary_table
from megatsp.schema import Config, ModelConfig
from megatsp.training.optimizer import AdamW

Loss = Callable[[Tensor, Tensor], Tensor]  # ids, labels [B, T] to the mean loss of a token


class DenseStep:
    """A `TrainStep` of a whole model on one rank; bf16 by autocast over fp32 weights."""

    def __init__(
        self, config: Config, device: torch.device, make: Callable[[Config], tuple[nn.Module, Loss]]
    ) -> None:
        if config.finetune.lora_rank:
            raise ValueError("a whole model has no adapters here: use finetune.lora_rank=0")
        ours = TrainStep(config, device)
        self.config, self.batches, self.device = config, ours.batches, device
        self.model, self._loss = make(config)
        weights = {name: _whole(p) for name, p in ours.gpt.named_parameters()}
        if "lm_head.weight" in self.model.state_dict():  # transformers lists a tied one too
            weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
        self.model.load_state_dict(weights, strict=True)
        self.model.to(device)
        self.optimizer = AdamW(self.model, config.optimizer)

    def run(self) -> Tensor:
        """One step; returns the loss."""
        losses = []
        for ids, labels, *_ in self.batches:
            with torch.autocast(
                self.device.type, torch.bfloat16, enabled=self.config.trainer.dtype == "bf16"
            ):
                loss = self._loss(ids, labels) / len(self.batches)
            loss.backward()
            losses.append(loss.detach())
        if self.config.optimizer.clip_grad > 0:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.clip_grad)
        self.optimizer.step(self.config.optimizer.lr)
        return torch.stack(losses).sum()


def _whole(parameter: nn.Parameter) -> Tensor:
    assert isinstance(parameter, DTensor)
    return parameter.full_tensor().detach()


def plain_step(config: Config, device: torch.device) -> DenseStep:
    """Raises ValueError for recompute_granularity=selective."""
    if config.trainer.recompute_granularity == "selective":
        raise ValueError(
            "plain computes nothing or whole layers again: use recompute_granularity=none or full"
        )
    return DenseStep(config, device, _plain)


def transformers_step(config: Config, device: torch.device) -> DenseStep:
    """Raises ValueError for what Llama is not, for recomputation, or without transformers."""
    if config.trainer.recompute_granularity != "none":
        raise ValueError("transformers computes nothing again here: use recompute_granularity=none")
    return DenseStep(config, device, _transformers)


def _plain(config: Config) -> tuple[nn.Module, Loss]:
    gpt = GPT(config.model)
    full = config.trainer.recompute_granularity == "full"

    def loss(ids: Tensor, labels: Tensor) -> Tensor:
        cos, sin = rotary_table(config.model, torch.arange(ids.shape[1], device=ids.device))
        x = F.embedding(ids, gpt.model.embed_tokens.weight)
        for i in range(config.model.num_layers):
            # cos = 1, sin = 0 is no rotation
            table = (
                (cos, sin) if has_rotary(config.model, i) else (torch.ones_like(cos), torch.zeros_like(sin))
            )
            layer = partial(_layer, gpt.layer(i), config.model)
            x = checkpoint(layer, x, *table, use_reentrant=False) if full else layer(x, *table)
        logits = F.linear(gpt.model.norm(x), gpt.head_weight).float()
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    return gpt, loss


def _layer(layer: DecoderLayer, model: ModelConfig, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    m, before = layer.mlp, model.norm_position == "before"

    def mlp(y: Tensor) -> Tensor:
        return m.down_proj(F.silu(m.gate_proj(y)) * m.up_proj(y))

    def attention(y: Tensor) -> Tensor:
        return _attention(layer.self_attn, model, y, cos, sin)

    for f, norm in zip((attention, mlp), layer.norms, strict=True):
        x = x + (f(norm(x)) if before else norm(f(x)))
    return x


def _attention(a: Attention, model: ModelConfig, y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    q, k, v = (p(y).unflatten(-1, (-1, model.kv_channels)) for p in (a.q_proj, a.k_proj, a.v_proj))
    if a.q_norm is not None and a.k_norm is not None:
        # [d] of each head, or [H d] and [K d] of all.
        q, k = (
            norm(t.flatten(2).unflatten(-1, (-1, norm.weight.numel()))).view_as(t)
            for t, norm in ((q, a.q_norm), (k, a.k_norm))
        )
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return a.o_proj(out.transpose(1, 2).flatten(2))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


def _transformers(config: Config) -> tuple[nn.Module, Loss]:
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise ValueError(f"no transformers here ({error}): pip install 'megatsp[hf]'") from error
    m = config.model
    scaled = m.rotary_scaling.type != "none" or m.no_rope_freq
    if m.add_qkv_bias or m.qk_layernorm or scaled or m.norm_position != "before":
        raise ValueError(
            "transformers stands for Llama here: no biases, norms of q and k or after sublayers, rotary "
            "scaling or layers without rotary"
        )
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=m.vocab_size,
            hidden_size=m.hidden_size,
            intermediate_size=m.ffn_hidden_size,
            num_hidden_layers=m.num_layers,
            num_attention_heads=m.num_attention_heads,
            num_key_value_heads=m.num_query_groups,
            head_dim=m.kv_channels,
            max_position_embeddings=config.trainer.seq_length,
            rope_parameters={"rope_type": "default", "rope_theta": m.rotary_base},
            rms_norm_eps=m.norm_epsilon,
            tie_word_embeddings=not m.untie_embeddings_and_output_weights,
            attn_implementation="sdpa",  # type: ignore[call-arg]  # of its base class
            use_cache=False,
        )
    ).train()

    def loss(ids: Tensor, labels: Tensor) -> Tensor:
        return llama(input_ids=ids, labels=labels, shift_labels=labels).loss

    return llama, loss
