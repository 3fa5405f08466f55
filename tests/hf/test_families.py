"""What a config.json means, both ways, and what is refused of it."""

import re
from dataclasses import replace

import pytest
from hf_models import CASES, LLAMA3, SIZES, YARN

from megatsp.hf.families import _NEUTRAL, _RENAMED, FAMILIES, Family, canonical, config_of, to_model
from megatsp.hf.rope import KEYS as ROPE_KEYS
from megatsp.model.gpt import count_parameters
from megatsp.schema import ModelConfig, RotaryScaling


def config(model_type: str = "llama", **keys) -> dict:
    """A config.json as transformers would write it."""
    from transformers import AutoConfig

    made = AutoConfig.for_model(model_type, **{**SIZES, **keys})
    architecture = next(f.architecture for f in FAMILIES.values() if f.model_type == model_type)
    return {**made.to_dict(), "architectures": [architecture], "model_type": model_type}


# What else a config.json may hold: read by name, or changing nothing that we compute.
OTHERS = (
    "tie_word_embeddings", "layer_types", "sliding_window", "no_rope_layers", "no_rope_layer_interval",
    "architectures", "model_type", "transformers_version", "dtype", "torch_dtype", "use_cache",
    "bos_token_id", "eos_token_id", "pad_token_id", "output_hidden_states", "output_attentions",
    "return_dict", "id2label", "label2id", "problem_type", "chunk_size_feed_forward", "_name_or_path",
    "max_window_layers",
)  # fmt: skip


def known_keys(family: Family) -> set[str]:
    return {*_RENAMED, *_NEUTRAL, *ROPE_KEYS, *family.fixed, *OTHERS}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.model_type)
def test_every_key_of_transformers_is_known_and_its_defaults_are_ours(family):
    from transformers import AutoConfig

    made = AutoConfig.for_model(family.model_type)
    assert made.to_dict().keys() <= known_keys(family)
    heads = made.num_attention_heads
    assert made.num_key_value_heads == (family.num_key_value_heads or heads)
    assert getattr(made, "head_dim", None) in (None, family.head_dim or made.hidden_size // heads)
    for key in ("rms_norm_eps", "max_position_embeddings", "tie_word_embeddings"):
        assert getattr(made, key) == getattr(family, key), key
    assert made.rope_parameters["rope_theta"] == family.rope_theta
    # Nothing but the sizes: all else takes the class's defaults.
    sizes = {
        key: SIZES[key] for key in ("hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers")
    }
    sparse = {**sizes, "num_attention_heads": 6, "architectures": [family.architecture]}
    if family.model_type == "mistral":
        sparse["sliding_window"] = None
    full = AutoConfig.for_model(
        family.model_type, **{k: v for k, v in sparse.items() if k != "architectures"}
    )
    assert to_model(sparse) == to_model({**full.to_dict(), "architectures": [family.architecture]})


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_config_goes_back_as_it_came(case):
    original = config(case.model_type, **case.keys)
    model = to_model(original)
    assert config_of(model, original) == original
    assert to_model(config_of(model)) == canonical(model)


@pytest.mark.parametrize(
    ("keys", "architecture"),
    [
        ({}, "LlamaForCausalLM"),
        (dict(hidden_size=40, num_attention_heads=6, num_query_groups=3), "MistralForCausalLM"),
        (dict(add_qkv_bias=True), "Qwen2ForCausalLM"),
        (dict(qk_layernorm=True), "Qwen3ForCausalLM"),
        (dict(no_rope_freq=2), "SmolLM3ForCausalLM"),
        (dict(qk_layernorm=True, qk_layernorm_width="all", norm_position="after"), "Olmo2ForCausalLM"),
        (dict(rotary_scaling=RotaryScaling("yarn", 4.0, attention_factor=1.2)), "LlamaForCausalLM"),
        (dict(rotary_scaling=RotaryScaling("llama3", 8.0)), "LlamaForCausalLM"),
        (dict(rotary_scaling=RotaryScaling("linear", 2.0)), "LlamaForCausalLM"),
    ],
)
def test_a_model_that_was_trained_here(keys, architecture):
    model = ModelConfig(**keys, max_position_embeddings=512)
    written = config_of(model)
    assert written["architectures"] == [architecture]
    assert to_model(written) == canonical(model)
    assert count_parameters(to_model(written)) == count_parameters(model)


def test_a_model_that_is_none_of_transformers():
    with pytest.raises(ValueError, match="no model of transformers has add_qkv_bias=True, qk_layernorm=True"):
        config_of(ModelConfig(add_qkv_bias=True, qk_layernorm=True))


def test_a_longer_context():
    """Rotary settings of a tuned model; what else its config.json says stays."""
    original = {**config("mistral", sliding_window=256), "pad_token_id": 7, "unsloth_version": "1"}
    model = replace(
        to_model(original),
        max_position_embeddings=1024,
        rotary_scaling=RotaryScaling("yarn", 4.0, original_max_position_embeddings=256),
    )
    written = config_of(model, original)
    assert to_model(written) == canonical(model)
    assert written["sliding_window"] is None  # 256 would be narrower than the context
    assert written["pad_token_id"] == 7 and written["unsloth_version"] == "1"
    from transformers import MistralConfig

    read = MistralConfig.from_dict(written)
    assert read.rope_parameters["factor"] == 4.0 and read.max_position_embeddings == 1024


def test_an_implied_original_length_stays_when_the_context_changes():
    rope = {key: value for key, value in YARN.items() if key != "original_max_position_embeddings"}
    original = {**config(), "rope_parameters": rope}
    model = to_model(original)
    assert model.rotary_scaling.original_max_position_embeddings == 256
    written = config_of(replace(model, max_position_embeddings=512), original)
    assert written["rope_parameters"]["original_max_position_embeddings"] == 256


def test_old_spelling_of_rope():
    new = to_model(config(rope_parameters=LLAMA3))
    old = {key: value for key, value in config().items() if key != "rope_parameters"}
    scaling = {key: value for key, value in LLAMA3.items() if key not in ("rope_type", "rope_theta")}
    for name in ("type", "rope_type"):
        assert to_model({**old, "rope_theta": 500.0, "rope_scaling": {name: "llama3", **scaling}}) == new


def test_remote_code_is_neither_run_nor_passed_on():
    original = {**config(), "auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}}
    assert "auto_map" not in config_of(to_model(original), original)


REFUSED = [
    (dict(architectures=["GPT2LMHeadModel"]), "GPT2LMHeadModel.*we compute LlamaForCausalLM"),
    (dict(architectures=["Qwen3MoeForCausalLM"]), "architecture Qwen3MoeForCausalLM: we compute"),
    (dict(architectures=None), "architecture none"),
    (dict(architectures=["EvilModel"], auto_map={"AutoModel": "x.Y"}), "never do"),
    (dict(model_type="mistral"), "model_type 'mistral'"),
    (dict(hidden_size=None), "no number above 0 as hidden_size"),
    (dict(rms_norm_eps="small"), "rms_norm_eps='small'"),
    (dict(attention_bias=True), "attention_bias=True: only False is computed"),
    (dict(mlp_bias=True), "mlp_bias=True"),
    (dict(hidden_act="gelu"), "hidden_act='gelu': only 'silu'"),
    (dict(pretraining_tp=2), "pretraining_tp=2"),
    (dict(attention_dropout=0.1), "attention_dropout=0.1"),
    (dict(clip_qkv=8.0), "clip_qkv=8.0"),
    (dict(logits_scaling=0.5), "logits_scaling=0.5"),
    (dict(attention_multiplier=0.5), "attention_multiplier=0.5: that is not computed"),
    (dict(num_local_experts=8), "num_local_experts=8"),
    (dict(layer_types=["full_attention", "sliding_attention"]), "layer_types with sliding_attention"),
    (dict(use_sliding_window=True), "use_sliding_window=True"),
    (dict(quantization_config={"quant_method": "fp8"}), "quantization_config='fp8'.*unquantised"),
    (dict(rope_parameters={"rope_type": "dynamic", "factor": 2.0}), "rope type 'dynamic'"),
    (dict(rope_parameters={"rope_type": "longrope", "factor": 2.0}), "rope type 'longrope'"),
    (dict(rope_parameters={"full_attention": {"rope_type": "default"}}), "one rotary embedding for all"),
    (
        dict(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}),
        "partial_rotary_factor 0.5",
    ),
    (dict(partial_rotary_factor=0.5), "partial_rotary_factor 0.5"),
    (dict(rope_parameters={**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}), "mscale=1.0"),
    (dict(rope_parameters={**YARN, "truncate": False}), "truncate=False"),
    (dict(rope_parameters={**YARN, "factor": -1}), "factor=-1"),
    (dict(rope_parameters={"rope_type": "linear"}), "linear without factor"),
    (dict(rope_parameters={"rope_type": "llama3", "factor": 8.0}), "llama3 without low_freq_factor"),
]


@pytest.mark.parametrize(("keys", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_what_is_not_computed_is_refused(keys, message):
    given = {**config(), **keys}
    with pytest.raises(ValueError, match=message):
        to_model(given)


def test_a_window_that_is_narrower_than_the_context():
    given = config("mistral", sliding_window=64)
    with pytest.raises(ValueError, match=re.escape("sliding_window=64 of a context of 256")):
        to_model(given)
    assert to_model({**given, "sliding_window": 256}).max_position_embeddings == 256
    del given["sliding_window"]  # transformers then takes 4096
    assert to_model(given)


def test_layers_without_rotary():
    given = config("smollm3", num_hidden_layers=6, no_rope_layer_interval=3)
    assert to_model(given).no_rope_freq == 3
    assert to_model({**given, "no_rope_layers": [1] * 6}).no_rope_freq == 0
    assert to_model({**given, "no_rope_layers": None}).no_rope_freq == 3
    with pytest.raises(ValueError, match="only one layer in every so many"):
        to_model({**given, "no_rope_layers": [0, 1, 1, 0, 1, 1]})
    with pytest.raises(ValueError, match="lists 2 of 6 layers"):
        to_model({**given, "no_rope_layers": [1, 0]})
