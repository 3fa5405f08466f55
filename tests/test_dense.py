"""The dense reference is right: it equals transformers' models, and its loss is the textbook's."""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from dense import DenseConfig, DenseGPT, DenseScaling, rotary_frequencies
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

LINEAR = DenseScaling("linear", factor=3.0)
# An original context of 64 tokens puts the four frequencies of d = 8 in all three of llama3's ranges.
LLAMA3 = DenseScaling("llama3", factor=8.0, original_max_position_embeddings=64)
# Of d = 8's four pairs one is kept, one blended and two divided; then two kept.
YARN = DenseScaling("yarn", factor=4.0, original_max_position_embeddings=128, beta_fast=8.0)
GIVEN = DenseScaling(
    "yarn", factor=4.0, original_max_position_embeddings=4096, beta_slow=2.0, attention_factor=0.7
)


@dataclass(frozen=True)
class Case:
    config: DenseConfig
    hf_config: type
    hf_model: type[PreTrainedModel]


TIED = DenseConfig()
UNTIED = replace(TIED, untie_embeddings_and_output_weights=True)
OLMO2 = replace(UNTIED, qk_layernorm=True, qk_layernorm_width="all", norm_position="after")
CASES = {
    "llama-tied": Case(TIED, LlamaConfig, LlamaForCausalLM),
    "llama-untied": Case(UNTIED, LlamaConfig, LlamaForCausalLM),
    "llama-mqa": Case(replace(TIED, num_query_groups=1), LlamaConfig, LlamaForCausalLM),
    "llama-linear": Case(replace(TIED, rotary_scaling=LINEAR), LlamaConfig, LlamaForCausalLM),
    "llama-llama3": Case(replace(UNTIED, rotary_scaling=LLAMA3), LlamaConfig, LlamaForCausalLM),
    "mistral": Case(replace(UNTIED, rotary_base=1e6), MistralConfig, MistralForCausalLM),
    "qwen2": Case(replace(TIED, add_qkv_bias=True), Qwen2Config, Qwen2ForCausalLM),
    "llama-yarn": Case(
        replace(UNTIED, rotary_scaling=YARN, rotary_base=500.0), LlamaConfig, LlamaForCausalLM
    ),
    "qwen2-yarn": Case(replace(TIED, add_qkv_bias=True, rotary_scaling=GIVEN), Qwen2Config, Qwen2ForCausalLM),
    "qwen3-yarn": Case(
        replace(TIED, qk_layernorm=True, kv_channels=12, rotary_scaling=YARN), Qwen3Config, Qwen3ForCausalLM
    ),
    "smollm3": Case(replace(TIED, num_layers=4, no_rope_freq=2), SmolLM3Config, SmolLM3ForCausalLM),
    "olmo2": Case(OLMO2, Olmo2Config, Olmo2ForCausalLM),
    "olmo2-mha": Case(replace(OLMO2, num_query_groups=6), Olmo2Config, Olmo2ForCausalLM),
    "qwen3": Case(replace(TIED, qk_layernorm=True, kv_channels=12), Qwen3Config, Qwen3ForCausalLM),
}


def hf_kwargs(c: DenseConfig) -> dict[str, object]:
    """The same model in the words of a transformers configuration."""
    s = c.rotary_scaling
    rope: dict[str, object] = {"rope_type": "default", "rope_theta": c.rotary_base}
    if s.type != "none":
        rope |= {"rope_type": s.type, "factor": s.factor}
    if s.type == "yarn":
        rope |= {
            "beta_fast": s.beta_fast,
            "beta_slow": s.beta_slow,
            "attention_factor": s.attention_factor or None,
            "original_max_position_embeddings": s.original_max_position_embeddings,
        }
    if s.type == "llama3":
        rope |= {
            "low_freq_factor": s.low_freq_factor,
            "high_freq_factor": s.high_freq_factor,
            "original_max_position_embeddings": s.original_max_position_embeddings,
        }
    return {
        "num_hidden_layers": c.num_layers,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.ffn_hidden_size,
        "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.num_query_groups,
        "head_dim": c.kv_channels,
        "vocab_size": c.vocab_size,
        "rms_norm_eps": c.norm_epsilon,
        "rope_parameters": rope,
        "max_position_embeddings": 512,
        "tie_word_embeddings": not c.untie_embeddings_and_output_weights,
        "attn_implementation": "eager",
        "no_rope_layer_interval": c.no_rope_freq,  # SmolLM3's; the others do not read it
        "pad_token_id": None,
    }


def random_gpt(config: DenseConfig, seed: int = 0) -> DenseGPT:
    """A model whose norm gains and biases are as random as its matrices."""
    generator = torch.Generator().manual_seed(seed)
    model = DenseGPT(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if "norm" in name else 0.0, 0.3, generator=generator)
    return model


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_logits_equal_transformers(case: Case) -> None:
    dense = random_gpt(case.config)
    reference = case.hf_model(case.hf_config(**hf_kwargs(case.config))).eval()
    weights = dense.state_dict()
    if not case.config.untie_embeddings_and_output_weights:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    reference.load_state_dict(weights, strict=True)

    ids = torch.randint(case.config.vocab_size, (3, 97), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, actual = reference(ids).logits, dense(ids)
    assert expected.std() > 0.1
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_llama3_scaling_covers_its_three_ranges() -> None:
    ratio = rotary_frequencies(replace(TIED, rotary_scaling=LLAMA3)) / rotary_frequencies(TIED)
    assert ratio[0] == 1 and ratio[-1] == pytest.approx(1 / 8) and ((ratio > 0.13) & (ratio < 0.99)).any()


@pytest.mark.parametrize(
    ("scaling", "ratios"), [(YARN, (1, 0.625, 0.25, 0.25)), (GIVEN, (1, 1, 0.625, 0.25))]
)
def test_yarn_keeps_blends_and_divides(scaling: DenseScaling, ratios: tuple[float, ...]) -> None:
    ratio = rotary_frequencies(replace(TIED, rotary_scaling=scaling)) / rotary_frequencies(TIED)
    torch.testing.assert_close(ratio, torch.tensor(ratios))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_loss_is_the_masked_mean(dtype: torch.dtype) -> None:
    model = random_gpt(UNTIED).to(dtype)
    generator = torch.Generator().manual_seed(2)
    ids, labels = torch.randint(67, (2, 3, 11), generator=generator)
    mask = torch.rand(3, 11, generator=generator) < 0.6

    logits = model(ids)
    loss = model.loss(ids, labels, mask)
    loss.backward()

    assert logits.dtype == dtype and loss.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(loss, F.cross_entropy(logits.to(loss.dtype)[mask], labels[mask]))
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_low_precision_follows_fp64() -> None:
    exact, single, half = (random_gpt(TIED).to(d) for d in (torch.float64, torch.float32, torch.bfloat16))
    ids = torch.randint(67, (2, 31), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        logits = exact(ids)
        errors = [((m(ids) - logits).abs().max() / logits.abs().max()).item() for m in (single, half)]
    assert errors[0] < 1e-5 and 1e-5 < errors[1] < 5e-2
