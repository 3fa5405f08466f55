"""Rotary settings of a config.json, in its two spellings, and ours.

Old: rope_theta and rope_scaling {type or rope_type, ...}. transformers 5: rope_parameters, which holds
rope_theta too. Where both stand, rope_scaling is what transformers takes.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from megatsp.schema import RotaryScaling

KEYS = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")

# Keys of RotaryScaling that each of our types reads, named as in a config.json.
READ: dict[str, tuple[str, ...]] = {
    "none": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor"),
}
_REQUIRED = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
_COMMON = ("type", "rope_type", "rope_theta", "partial_rotary_factor")


def read_rope(config: Mapping[str, Any], default_theta: float) -> tuple[float, RotaryScaling]:
    """rotary_base and rotary_scaling of a config.json.

    Raises:
        ValueError: frequencies that we do not compute: another type, an option of it that we lack.
    """
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(given, Mapping) or any(isinstance(value, Mapping) for value in given.values()):
        raise ValueError(f"rope_parameters {given}: one rotary embedding for all layers is what we compute")
    theta = given.get("rope_theta", config.get("rope_theta"))
    part = given.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if part not in (None, 1):
        raise ValueError(f"partial_rotary_factor {part}: only heads that turn as a whole are computed")
    spelt = given.get("rope_type", given.get("type")) or "default"
    kind = "none" if spelt == "default" else spelt
    if kind not in READ:
        raise ValueError(f"rope type {spelt!r}: only default, linear, llama3 and yarn are computed")
    theta = default_theta if theta is None else theta
    if isinstance(theta, bool) or not isinstance(theta, (int, float)) or theta <= 0:
        raise ValueError(f"rope_theta={theta!r}: expected a number above 0")
    return float(theta), RotaryScaling(type=kind, **_values(given, kind, config))


def _values(given: Mapping[str, Any], kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of one type, as RotaryScaling has them."""
    neutral = {"truncate": True} if kind == "yarn" else {"factor": 1}
    if kind in ("none", "linear"):  # it is there in some files, and nothing reads it
        neutral["original_max_position_embeddings"] = given.get("original_max_position_embeddings", 0)
    for key, value in given.items():
        if key in READ[kind] or key in _COMMON or (key in neutral and value == neutral[key]):
            continue
        if value is None and key != "truncate":
            continue
        raise ValueError(f"rope type {kind} with {key}={value}: that option is not computed")
    context = config.get("max_position_embeddings")
    original = config.get("original_max_position_embeddings") or given.get("original_max_position_embeddings")
    found = {key: given[key] for key in READ[kind] if given.get(key) is not None}
    if "original_max_position_embeddings" in READ[kind]:
        if not (original or context):
            raise ValueError(f"rope type {kind} without original_max_position_embeddings")
        found["original_max_position_embeddings"] = original or context
    if kind == "yarn" and "factor" not in found:
        if not context:
            raise ValueError("rope type yarn without factor and without max_position_embeddings")
        found["factor"] = context / found["original_max_position_embeddings"]
    if missing := [key for key in _REQUIRED.get(kind, ()) if key not in found]:
        raise ValueError(f"rope type {kind} without {', '.join(missing)}")
    for key, value in found.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            raise ValueError(f"rope type {kind} with {key}={value!r}: expected a number above 0")
    whole = "original_max_position_embeddings"
    return {key: int(value) if key == whole else float(value) for key, value in found.items()}


def canonical(scaling: RotaryScaling) -> RotaryScaling:
    """`scaling` without what its type does not read."""
    return RotaryScaling(type=scaling.type, **{key: getattr(scaling, key) for key in READ[scaling.type]})


def write_rope(base: float, scaling: RotaryScaling) -> dict[str, Any]:
    """The keys of a config.json, in both spellings, for every version of transformers."""
    values = {key: getattr(scaling, key) for key in READ[scaling.type]}
    if not values.get("attention_factor", 1):
        del values["attention_factor"]  # 0 is our spelling of "not given"
    kind = "default" if scaling.type == "none" else scaling.type
    named = {"rope_type": kind, **values}
    found: dict[str, Any] = {"rope_theta": base, "rope_parameters": {**named, "rope_theta": base}}
    if values:
        found["rope_scaling"] = {**named, "rope_theta": base}
    return found


assert {field.name for field in fields(RotaryScaling)} == {"type", *READ["llama3"], *READ["yarn"]}
