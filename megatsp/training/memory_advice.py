"""Which settings would free memory, and how much of it: each is validated and predicted, none is guessed."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from operator import attrgetter
from typing import Any

from megatsp.parallel_rules import divisors
from megatsp.schema import Config
from megatsp.training.memory import predict
from megatsp.validate import validate

_BUCKETS = ("parallel.attention_buckets", "parallel.mlp_buckets", "parallel.head_buckets")
_ADAPTERS = 16  # lora_rank of finetune=lora


def advice(config: Config, world_size: int, most: int = 8) -> Iterator[str]:
    """Lines: what is predicted now, and the changes that save most, the largest saving first.

    config: validated. most: how many changes.
    """
    now = predict(config)
    yield (
        f"predicted for a rank: {_mib(now.total)}: weights {_mib(now.weights)}, gradients "
        f"{_mib(now.gradients)}, optimizer {_mib(now.optimizer)}, activations {_mib(now.saved_activations)}, "
        f"gathered weights {_mib(now.gathered)}; beside them the working memory of one layer"
    )
    found = savings(config, world_size)
    if not found:
        yield "no setting would save memory: use more ranks, a smaller model or shorter samples"
        return
    yield "what would save memory on each rank, as predicted:"
    for saved, text in found[:most]:
        yield f"  {_mib(saved):>12}  {text}"


def savings(config: Config, world_size: int) -> list[tuple[int, str]]:
    """(predicted bytes per rank that are saved, overrides), the largest saving first."""
    now = predict(config).total
    found: dict[str, int] = {}
    for changes, ranks, note in _changes(config, world_size):
        try:
            changed = validate(_changed(config, changes), ranks)
        except ValueError:
            continue  # this model or mesh does not take it
        # What validate() chose anew is said too: so it is what was predicted, whatever was given before.
        chosen = {key: attrgetter(key)(changed) for key in _BUCKETS}
        shown = {key: value for key, value in changes.items() if key not in chosen}
        shown |= {key: n for key, n in chosen.items() if n != attrgetter(key)(config)}
        text = " ".join(f"{key}={value}" for key, value in shown.items()) + note
        if (saved := now - predict(changed).total) > 0:
            found[text] = saved
    return sorted(((saved, text) for text, saved in found.items()), key=lambda item: (-item[0], item[1]))


def _changes(config: Config, world_size: int) -> Iterator[tuple[dict[str, Any], int, str]]:
    """(changed keys, ranks of the whole job, remark) of what may help, allowed or not."""
    trainer, p = config.trainer, config.parallel
    order = ("none", "selective", "full")
    for granularity in order[order.index(trainer.recompute_granularity) + 1 :]:
        yield {"trainer.recompute_granularity": granularity}, world_size, ""
    smaller = [n for n in divisors(trainer.micro_batch_size) if n < trainer.micro_batch_size]
    for size in {*smaller[-1:], *smaller[:1]}:
        yield {"trainer.micro_batch_size": size}, world_size, ""
    if trainer.dtype == "fp32":
        yield {"trainer.dtype": "bf16"}, world_size, ""
    yield from ((changes, world_size, "") for changes in _finer_buckets(config))
    chosen_anew = dict.fromkeys(_BUCKETS, 0)
    for axis in ("dp_replicate", "dp_shard", "cp"):  # ranks that would cut weights, or tokens too, instead
        for target in ("tsp", "dp_shard"):
            for factor in divisors(getattr(p, axis))[1:]:
                if target == axis or (target == "tsp" and p.tp > 1):
                    continue
                moved = {f"parallel.{target}": getattr(p, target) * factor}
                moved[f"parallel.{axis}"] = getattr(p, axis) // factor
                yield moved | (chosen_anew if target == "tsp" else {}), world_size, ""
    if p.cp > 1 and not p.fsdp_over_cp:
        yield {"parallel.fsdp_over_cp": "true"}, world_size, ""
    if p.tp == 1:
        more = {"parallel.tsp": 2 * p.tsp, **chosen_anew}
        yield more, 2 * world_size, f" (on {2 * world_size} ranks)"
    yield {"parallel.dp_shard": 2 * p.dp_shard}, 2 * world_size, f" (on {2 * world_size} ranks)"
    if config.finetune.hf and not config.finetune.lora_rank:
        note = " (finetune=lora; a new run: adapters alone are tuned)"
        yield {"finetune.lora_rank": _ADAPTERS}, world_size, note


def _finer_buckets(config: Config) -> Iterator[dict[str, Any]]:
    """Two and four times the buckets: of one part, and of all parts together."""
    for factor in (2, 4):
        finer = {key: factor * attrgetter(key)(config) for key in _BUCKETS}
        groups = max(1, config.model.num_query_groups // config.parallel.tp)
        if groups % finer[_BUCKETS[0]]:
            finer[_BUCKETS[0]] = attrgetter(_BUCKETS[0])(config)  # no whole heads are left to cut
        changed = {key: n for key, n in finer.items() if n != attrgetter(key)(config)}
        yield changed
        yield from ({key: n} for key, n in changed.items())


def _changed(config: Config, changes: Mapping[str, Any]) -> Config:
    for path, value in changes.items():
        group, name = path.split(".")
        typed = value == "true" if value in ("true", "false") else value
        config = replace(config, **{group: replace(getattr(config, group), **{name: typed})})
    return config


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
