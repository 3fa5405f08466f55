"""PEFT's adapter_config.json: written for our adapters, and read as far as what it says can be computed.

Source: huggingface/peft 0.21, LoraConfig and LoraLayer.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from megatsp.nearest import did_you_mean
from megatsp.schema import MATRICES, FinetuneConfig

# Options and the values at which they change nothing; None does everywhere.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "lora_bias": (False,),
    "use_dora": (False,),
    "use_qalora": (False,),
    "use_bdlora": (False,),
    "modules_to_save": ([],),
    "trainable_token_indices": ([], {}),
    "layer_replication": ([],),
    "target_parameters": ([],),
    "alora_invocation_tokens": ([],),
    "arrow_config": (),
    "kasa_config": (),
    "velora_config": (),
    "monteclora_config": (),
    "megatron_config": (),
    # Other first values than these change the base's weights too.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}
_WHY = {
    "use_dora": "it also scales every row by a learnt magnitude",
    "bias": "it also trains the base's biases",
    "modules_to_save": "whole modules of the base were trained too",
    "trainable_token_indices": "rows of the embedding were trained too",
    "init_lora_weights": "it changes the base's weights too; let PEFT convert it when it saves",
    "peft_type": "we compute LoRA alone",
}

# What says nothing about the result, or is read elsewhere.
_READ_OR_IGNORED = {
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "task_type", "auto_mapping", "base_model_name_or_path",
    "revision", "inference_mode", "lora_dropout", "megatron_core", "peft_version", "qalora_group_size",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config", "ensure_weight_tying",
}  # fmt: skip


def config_of(finetune: FinetuneConfig, base: str) -> dict[str, Any]:
    """adapter_config.json for a run's adapters; base: the path or name of the model they are for."""
    alpha = finetune.lora_alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": finetune.lora_rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "target_modules": [name for name in MATRICES if name in finetune.lora_targets],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_dora": False,
        "use_rslora": False,
    }


def check_options(config: Mapping[str, Any]) -> None:
    """Refuses what changes the result in a way that we do not compute.

    Raises:
        ValueError: names the option, and why.
    """
    for key, value in config.items():
        if key in _READ_OR_IGNORED or value is None:
            continue
        if key not in _NEUTRAL:
            if value or (value == 0 and value is not False):
                near = did_you_mean(key, {*_NEUTRAL, *_READ_OR_IGNORED})
                raise ValueError(f"{key}={value!r}: no option that we know{near}; only adapters without it")
        elif value not in _NEUTRAL[key]:
            why = _WHY.get(key, "we do not compute that")
            raise ValueError(f"{key}={value!r}: {why}")


def scales(config: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, float]:
    """What B A is multiplied with, by module.

    ranks: of the adapters' tensors, by module such as model.layers.0.mlp.up_proj.

    Raises:
        ValueError: the ranks are not what the configuration says, or it says none.
    """
    found = {}
    for module, rank in ranks.items():
        wanted = _pattern(config, "rank_pattern", module, config.get("r"))
        alpha = _pattern(config, "alpha_pattern", module, config.get("lora_alpha"))
        if rank != wanted:
            raise ValueError(f"the adapter of {module} has rank {rank}, by adapter_config.json {wanted!r}")
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
            raise ValueError(f"lora_alpha={alpha!r} in adapter_config.json: expected a number")
        found[module] = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return found


def _pattern(config: Mapping[str, Any], key: str, module: str, default: Any) -> Any:
    """The value of the first pattern that the module's name, or its end, matches; as PEFT does it."""
    patterns = config.get(key) or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"{key}={patterns!r} in adapter_config.json: expected names and numbers")
    for pattern, value in patterns.items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as error:
            raise ValueError(f"{key} in adapter_config.json: {pattern!r} is no pattern: {error}") from None
    return default


def check_targets(config: Mapping[str, Any], modules: Iterable[str], adapted: Iterable[str]) -> None:
    """Holds the modules that target_modules names against the model's, and those that have adapters.

    modules: all of the model that may have adapters; adapted: those that have.

    Raises:
        ValueError: a target is not in the model, or there is a target without adapter, or one too many.
    """
    targets, modules, adapted = config.get("target_modules"), list(modules), set(adapted)
    if not isinstance(targets, list):
        return  # a pattern, or none: the tensors say which
    for target in targets:
        if not any(_is_meant(target, module) for module in modules):
            near = did_you_mean(str(target), MATRICES)
            raise ValueError(f"target_modules: the model has no {target}{near}; of {', '.join(MATRICES)}")
    meant = {module for module in modules if any(_is_meant(target, module) for target in targets)}
    if beside := sorted(adapted - meant):
        raise ValueError(f"{beside[0]} has an adapter, but is not among target_modules")
    restricted = any(config.get(key) for key in ("exclude_modules", "layers_to_transform", "layers_pattern"))
    if not restricted and (missing := sorted(meant - adapted)):
        raise ValueError(
            f"{len(missing)} of {len(meant)} target modules have no adapter in the file, such as {missing[0]}"
        )


def _is_meant(target: Any, module: str) -> bool:
    return module == target or module.endswith(f".{target}")


def matrices(names: Iterable[str]) -> Iterator[str]:
    """The modules of a model, given its parameters' names, that may have adapters."""
    for name in names:
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in MATRICES and module != name:
            yield module
