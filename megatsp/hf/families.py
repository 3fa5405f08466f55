"""The families of Hugging Face models that we compute, as one table: what their config.json means.

Their tensors need no table of their own: our parameters have their names and shapes, nothing is transposed.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from megatsp.hf.rope import KEYS as ROPE_KEYS
from megatsp.hf.rope import canonical as canonical_scaling
from megatsp.hf.rope import read_rope, write_rope
from megatsp.schema import ModelConfig


@dataclass(frozen=True)
class Family:
    """One class of transformers: what its code fixes, and what an absent key of config.json means to it.

    num_key_value_heads, head_dim: 0 means as many as query heads, and hidden_size divided among them.
    fixed: options that its code reads, and at which value alone we compute the same.
    """

    architecture: str
    model_type: str
    models: str
    add_qkv_bias: bool = False
    qk_layernorm: bool = False
    qk_layernorm_width: str = "head"
    norm_position: str = "before"
    has_no_rope_layers: bool = False
    num_key_value_heads: int = 0
    head_dim: int = 0
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    fixed: dict[str, Any] = field(default_factory=dict)


_NO_BIAS = {"attention_bias": False}

FAMILIES = {
    family.architecture: family
    for family in (
        Family(
            "LlamaForCausalLM", "llama", "Llama 2, 3.x; SmolLM, SmolLM2",
            fixed={**_NO_BIAS, "mlp_bias": False},
        ),
        Family(
            "MistralForCausalLM", "mistral", "Mistral", num_key_value_heads=8, max_position_embeddings=131072
        ),
        Family(
            "Qwen2ForCausalLM", "qwen2", "Qwen2, Qwen2.5",
            add_qkv_bias=True, num_key_value_heads=32, max_position_embeddings=32768,
        ),
        Family(
            "Qwen3ForCausalLM", "qwen3", "Qwen3 (dense)", qk_layernorm=True, num_key_value_heads=32,
            head_dim=128, max_position_embeddings=32768, fixed=_NO_BIAS,
        ),
        Family(
            "SmolLM3ForCausalLM", "smollm3", "SmolLM3", has_no_rope_layers=True, num_key_value_heads=4,
            rope_theta=2000000.0, max_position_embeddings=32768, tie_word_embeddings=True,
            fixed={**_NO_BIAS, "mlp_bias": False},
        ),
        Family(
            "Olmo2ForCausalLM", "olmo2", "OLMo 2", qk_layernorm=True, qk_layernorm_width="all",
            norm_position="after", rms_norm_eps=1e-5, fixed=_NO_BIAS,
        ),
    )
}  # fmt: skip

# Keys of config.json that are keys of ModelConfig under another name.
_RENAMED = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "head_dim": "kv_channels",
    "vocab_size": "vocab_size",
    "rms_norm_eps": "norm_epsilon",
    "max_position_embeddings": "max_position_embeddings",
    "initializer_range": "init_method_std",
}
_REQUIRED = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")

# Options that change what some model computes, and the values at which they change nothing. They are
# refused in every family: a model that needs one is not what its architecture says.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "quantization_config": ({},),
    "pretraining_tp": (1,),
    "attention_dropout": (0,),
    "hidden_dropout": (0,),
    "resid_pdrop": (0,),
    "embd_pdrop": (0,),
    "residual_dropout": (0,),
    "clip_qkv": (0,),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "attention_multiplier": (),
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "rope_interleaved": (False,),
    "use_sliding_window": (False,),
    "num_experts": (0, 1),
    "num_local_experts": (0, 1),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
}

# Tensors of old checkpoints that hold what config.json says already.
_SUPERFLUOUS = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


def family_of(config: Mapping[str, Any]) -> Family:
    """The family that a config.json names.

    Raises:
        ValueError: another architecture, or none.
    """
    named = config.get("architectures") or []
    if not isinstance(named, list):
        raise ValueError(f"architectures={named!r} in config.json: expected a list of names")
    known = [FAMILIES[name] for name in named if name in FAMILIES]
    if not known:
        remote = (
            " Its code (auto_map) would have to be run, which we never do." if config.get("auto_map") else ""
        )
        shown = ", ".join(map(str, named)) or "none"
        raise ValueError(f"architecture {shown}: we compute {', '.join(FAMILIES)}.{remote}")
    family = known[0]
    if config.get("model_type", family.model_type) != family.model_type:
        raise ValueError(
            f"architecture {family.architecture} with model_type {config['model_type']!r}: it is "
            f"{family.model_type!r}; which of them is meant?"
        )
    return family


def to_model(config: Mapping[str, Any]) -> ModelConfig:
    """The model that a config.json describes, max_position_embeddings filled in.

    Raises:
        ValueError: an architecture, or an option, that we do not compute as transformers does.
    """
    family = family_of(config)
    if missing := [key for key in _REQUIRED if not isinstance(config.get(key), int) or config[key] < 1]:
        raise ValueError(f"config.json has no number above 0 as {', '.join(missing)}")
    values: dict[str, Any] = {ours: config.get(theirs) for theirs, ours in _RENAMED.items()}
    heads, h = config["num_attention_heads"], config["hidden_size"]
    for ours, default in (
        (
            "num_query_groups",
            heads if "num_key_value_heads" in config else family.num_key_value_heads or heads,
        ),
        ("kv_channels", h // heads if "head_dim" in config else family.head_dim or h // heads),
        ("norm_epsilon", family.rms_norm_eps),
        ("max_position_embeddings", family.max_position_embeddings),
        ("init_method_std", 0.02),
    ):
        values[ours] = default if values[ours] is None else values[ours]
    for theirs, ours in _RENAMED.items():
        kind = type(getattr(ModelConfig, ours))
        if isinstance(values[ours], bool) or not isinstance(values[ours], (int, kind)) or values[ours] <= 0:
            raise ValueError(f"{theirs}={values[ours]!r} in config.json: expected a number above 0")
        values[ours] = kind(values[ours])
    tied = config.get("tie_word_embeddings", family.tie_word_embeddings)
    if not isinstance(tied, bool):
        raise ValueError(f"tie_word_embeddings={tied!r} in config.json: expected true or false")
    base, scaling = read_rope(config, family.rope_theta)
    model = ModelConfig(
        **values,
        rotary_base=base,
        rotary_scaling=scaling,
        add_qkv_bias=family.add_qkv_bias,
        qk_layernorm=family.qk_layernorm,
        qk_layernorm_width=family.qk_layernorm_width,
        norm_position=family.norm_position,
        no_rope_freq=_no_rope_freq(config) if family.has_no_rope_layers else 0,
        untie_embeddings_and_output_weights=not tied,
    )
    if refused := list(_refusals(config, family, model)):
        raise ValueError("; ".join(refused))
    return model


def _refusals(config: Mapping[str, Any], family: Family, model: ModelConfig) -> Iterator[str]:
    """Options at values with which transformers computes something else than we do."""
    neutral = {**_NEUTRAL, **{key: (value,) for key, value in family.fixed.items()}}
    for key, values in neutral.items():
        given = config.get(key)
        if given is not None and given not in values:
            hint = f"only {values[0]!r} is computed" if values else "that is not computed"
            if key == "quantization_config":
                method = given.get("quant_method", "unknown") if isinstance(given, Mapping) else given
                given, hint = method, "give the model's unquantised weights"
            yield f"{key}={given!r}: {hint}"
    kinds = set(config.get("layer_types") or ()) - {"full_attention"}
    if kinds:
        yield f"layer_types with {', '.join(sorted(map(str, kinds)))}: only full_attention is computed"
    if family.model_type == "mistral":
        window, context = config.get("sliding_window", 4096), model.max_position_embeddings
        if window is not None and window < context:
            yield (
                f"sliding_window={window} of a context of {context}: attention over all tokens alone is "
                f"computed. For texts of up to {window} tokens that is the same: set "
                f"max_position_embeddings to {window} in config.json"
            )


def _no_rope_freq(config: Mapping[str, Any]) -> int:
    """Every how manieth layer has no rotary embedding; 0: all have it.

    Raises:
        ValueError: the layers follow no such rule.
    """
    layers, interval = config["num_hidden_layers"], config.get("no_rope_layer_interval", 4)
    listed = config.get("no_rope_layers")
    if listed is None:
        return interval if interval <= layers else 0
    turns = [bool(turned) for turned in listed[:layers]]
    if len(turns) < layers:
        raise ValueError(f"no_rope_layers lists {len(turns)} of {layers} layers")
    if all(turns):
        return 0
    freq = turns.index(False) + 1
    if turns != [(i + 1) % freq != 0 for i in range(layers)]:
        raise ValueError(f"no_rope_layers={listed}: only one layer in every so many, the last, may have none")
    return freq


def is_superfluous(name: str, model: ModelConfig) -> bool:
    """Whether a tensor that the model has no parameter for is one that a checkpoint may hold all the same."""
    tied_head = name == "lm_head.weight" and not model.untie_embeddings_and_output_weights
    return tied_head or _SUPERFLUOUS.fullmatch(name) is not None


def canonical(model: ModelConfig) -> ModelConfig:
    """The same model without keys that change nothing in it, so that equal ones compare equal."""
    return replace(
        model,
        rotary_scaling=canonical_scaling(model.rotary_scaling),
        no_rope_freq=model.no_rope_freq if model.no_rope_freq <= model.num_layers else 0,
        qk_layernorm_width=model.qk_layernorm_width if model.qk_layernorm else "head",
    )


def config_of(model: ModelConfig, original: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The config.json of `model`: `to_model` gives back its `canonical` form.

    original: the config.json that it came from, of which all is kept that still holds.

    Raises:
        ValueError: no family computes it.
    """
    model = canonical(model)
    if original is None:
        family = _fitting(model)
        config, before = _first_config(family), None
    else:
        family, config, before = family_of(original), dict(original), to_model(original)
        config.pop("auto_map", None)  # of code that does not come along
    for theirs, ours in _RENAMED.items():
        if before is None or getattr(before, ours) != getattr(model, ours):
            config[theirs] = getattr(model, ours)
    rope = model.rotary_base, model.rotary_scaling
    if before is None or read_rope(config, family.rope_theta) != rope:
        for key in (*ROPE_KEYS, "original_max_position_embeddings"):
            config.pop(key, None)
        config |= write_rope(*rope)
    if before is None or before.no_rope_freq != model.no_rope_freq:
        config |= _no_rope(model) if family.has_no_rope_layers else {}
    if (window := config.get("sliding_window")) and window < model.max_position_embeddings:
        config["sliding_window"] = None  # it was no narrower than the context then
    if (
        before is None
        or before.untie_embeddings_and_output_weights != model.untie_embeddings_and_output_weights
    ):
        config["tie_word_embeddings"] = not model.untie_embeddings_and_output_weights
    if (found := to_model(config)) != model:
        raise ValueError(f"{family.architecture} cannot be {model}; it would be {found}")
    return config


def _fitting(model: ModelConfig) -> Family:
    """The family of a model that was trained here."""
    keys = ("add_qkv_bias", "qk_layernorm", "qk_layernorm_width", "norm_position")
    for family in FAMILIES.values():
        same = all(getattr(family, key) == getattr(model, key) for key in keys)
        if not same or family.has_no_rope_layers != (model.no_rope_freq > 0):
            continue
        if family.model_type == "llama" and model.hidden_size % model.num_attention_heads:
            continue  # transformers refuses that; Mistral's class, which is the same, does not
        return family
    given = ", ".join(f"{key}={getattr(model, key)}" for key in (*keys, "no_rope_freq"))
    raise ValueError(f"no model of transformers has {given}: we can write {', '.join(FAMILIES)}")


def _first_config(family: Family) -> dict[str, Any]:
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **family.fixed,
    }
    if family.model_type == "mistral":
        config["sliding_window"] = None
    return config


def _no_rope(model: ModelConfig) -> dict[str, Any]:
    layers, freq = model.num_layers, model.no_rope_freq or model.num_layers + 1
    return {
        "no_rope_layer_interval": freq,
        "no_rope_layers": [int((i + 1) % freq != 0) for i in range(layers)],
    }


def differences(one: ModelConfig, other: ModelConfig) -> list[str]:
    """What each says of every key in which they differ; not of first values and the context's length."""
    return [
        f"model.{key}: {value!r} and {getattr(other, key)!r}"
        for key, value in vars(one).items()
        if key not in ("init_method_std", "max_position_embeddings") and value != getattr(other, key)
    ]
