"""The model that `megatsp sft` tunes: what its checkpoint says, and the little that may be set beside it."""

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from megatsp.hf.hub import check_name
from megatsp.schema import Config, ModelConfig, RotaryScaling

if TYPE_CHECKING:
    from megatsp.hf.checkpoint import HFCheckpoint

# A longer context changes these; every other key is what the weights were trained with.
OVERRIDABLE = ("rotary_base", "rotary_scaling", "max_position_embeddings")


def open_source(name: str) -> "HFCheckpoint":
    """The checkpoint that finetune.hf names.

    Raises:
        ValueError: it names none, or one that cannot be computed exactly.
    """
    if not name:
        raise ValueError(
            "finetune.hf is missing: the folder of a Hugging Face checkpoint, or its name on the hub, as in "
            "`megatsp sft finetune.hf=Qwen/Qwen3-8B data.path=PREFIX`; first weights are for `megatsp train`"
        )
    check_name(name)
    from megatsp.hf.checkpoint import open_checkpoint  # and torch, which takes seconds

    return open_checkpoint(name, hashes=False)  # a new run reads all files once, on one rank


def model_before_overrides(source: ModelConfig, asked: ModelConfig) -> ModelConfig:
    """The model's keys before any that are set by name.

    asked: the schema's defaults with the latter.

    Another type of scaling begins anew, from the length before the checkpoint's own extension; where it has
    none, that is its context.
    """
    own, kind = source.rotary_scaling, asked.rotary_scaling.type
    if kind in ("none", own.type):
        return source
    original = own.original_max_position_embeddings
    if own.type in ("none", "linear"):  # which do not read it
        original = int(source.max_position_embeddings / own.factor)
    return replace(source, rotary_scaling=RotaryScaling(original_max_position_embeddings=original))


def check_model(source: "HFCheckpoint", config: Config) -> Config:
    """`config` with the context length that the tuned model will say it has.

    Raises:
        ValueError: a key of `model` that is another in the checkpoint and cannot be changed; samples that
            are longer than the checkpoint's context, and nothing said about that.
    """
    theirs, ours = source.model, config.model
    if ours.rotary_scaling.type == "none" != theirs.rotary_scaling.type:  # it is taken away
        ours = replace(ours, rotary_scaling=RotaryScaling())
        config = replace(config, model=ours)
    _check_attention_factor(theirs.rotary_scaling, ours.rotary_scaling)
    changed = [
        f"model.{name}: {there!r} there, {here!r} here"
        for name, there, here in _differences(asdict(theirs), asdict(ours))
        if name.partition(".")[0] not in OVERRIDABLE
    ]
    if changed:
        raise ValueError(
            f"{source.folder} is another model: {'; '.join(changed)}. Leave these keys out; only "
            "model.rotary_base, model.rotary_scaling.* and model.max_position_embeddings may be set"
        )
    length, context = config.trainer.seq_length, ours.max_position_embeddings
    if not context or length <= context:
        return config
    if context != theirs.max_position_embeddings:
        raise ValueError(
            f"model.max_position_embeddings={context}: trainer.seq_length={length} is longer; set it to "
            f"{length} or more, or leave it out"
        )
    if (ours.rotary_base, ours.rotary_scaling) == (theirs.rotary_base, theirs.rotary_scaling):
        raise ValueError(
            f"trainer.seq_length={length}: {source.folder} has a context of {context} tokens. Extend it by "
            f"{_extension(theirs, length)}, or by a larger model.rotary_base (here {theirs.rotary_base:g}); "
            f"or train longer samples as it is, by model.max_position_embeddings={length}"
        )
    scaling = ours.rotary_scaling
    reach = scaling.factor * scaling.original_max_position_embeddings
    if scaling.type == "yarn" and length > reach:
        raise ValueError(
            f"model.rotary_scaling.type=yarn: factor {scaling.factor:g} of "
            f"original_max_position_embeddings={scaling.original_max_position_embeddings} reaches {reach:g} "
            f"tokens, trainer.seq_length={length} is longer; set model.rotary_scaling.factor="
            f"{length / scaling.original_max_position_embeddings:g}"
        )
    return replace(config, model=replace(ours, max_position_embeddings=length))


def _check_attention_factor(theirs: RotaryScaling, ours: RotaryScaling) -> None:
    """Refuses another factor of YaRN beside the attention_factor that goes with the checkpoint's.

    Raises:
        ValueError: that would be so.
    """
    kept = ours.type == "yarn" and ours.attention_factor == theirs.attention_factor != 0
    if kept and ours.factor != theirs.factor:
        raise ValueError(
            f"model.rotary_scaling.factor={ours.factor:g}: the checkpoint's attention_factor="
            f"{ours.attention_factor:g} goes with its factor {theirs.factor:g}; set "
            "model.rotary_scaling.attention_factor too (0 follows from the factor)"
        )


def _extension(model: ModelConfig, length: int) -> str:
    """The settings that stretch the model's rotary embedding, scaled or not, to so many tokens."""
    scaling, times = model.rotary_scaling, length / model.max_position_embeddings
    if scaling.type == "none":
        return f"model.rotary_scaling.type=yarn model.rotary_scaling.factor={times:g}"
    given = f"(its {scaling.type} has {scaling.factor:g})"
    return f"model.rotary_scaling.factor={scaling.factor * times:g} {given}"


def _differences(there: dict[str, Any], here: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(key, value there, value here) of every key that differs."""
    return ((name, value, here[name]) for name, value in there.items() if value != here[name])
