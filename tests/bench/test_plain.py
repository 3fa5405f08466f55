"""The single-process references compute what we compute: same losses over several steps."""

from dataclasses import replace

import pytest
import torch
from distributed import run_distributed

from megatsp.bench.plain import _transformers, plain_step, transformers_step
from megatsp.bench.step import TrainStep
from megatsp.schema import Config, ModelConfig, OptimizerConfig, RotaryScaling, TrainerConfig
from megatsp.validate import validate

CONFIG = Config(
    model=ModelConfig(
        num_layers=2, hidden_size=40, ffn_hidden_size=107, num_attention_heads=4, num_query_groups=2,
        kv_channels=6, vocab_size=131, rotary_base=5000.0, init_method_std=0.2,
    ),
    trainer=TrainerConfig(seq_length=48, micro_batch_size=3, global_batch_size=6),
    optimizer=OptimizerConfig(lr=0.03),
)  # fmt: skip
FACTORIES = {"plain": plain_step, "transformers": transformers_step}


def rank_losses(name: str, config: Config) -> list[tuple[float, float]]:
    """Ours and the reference's losses of three steps: the later ones see gradients and updates too."""
    device = torch.device("cpu")
    ours, theirs = TrainStep(config, device), FACTORIES[name](config, device)
    return [(ours.run().item(), theirs.run().item()) for _ in range(3)]


@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize(
    ("name", "recompute"), [("plain", "none"), ("plain", "full"), ("transformers", "none")]
)
def test_losses_are_ours(name, untied, recompute):
    model = replace(CONFIG.model, untie_embeddings_and_output_weights=untied)
    trainer = replace(CONFIG.trainer, recompute_granularity=recompute)
    config = validate(replace(CONFIG, model=model, trainer=trainer), 1)
    ((first, *later),) = run_distributed(rank_losses, 1, name, config)
    assert first[0] == pytest.approx(first[1], rel=1e-6)
    assert later == [(pytest.approx(theirs, rel=1e-4), theirs) for _, theirs in later]
    assert abs(later[-1][0] - first[0]) > 0.05  # the weights moved


FAMILIES = (
    dict(add_qkv_bias=True, qk_layernorm=True),
    dict(qk_layernorm=True, qk_layernorm_width="all", norm_position="after"),
    dict(no_rope_freq=2, rotary_scaling=RotaryScaling("yarn", 4.0, original_max_position_embeddings=512)),
)


def rank_losses_of_each(configs: list[Config]) -> list[list[tuple[float, float]]]:
    return [rank_losses("plain", config) for config in configs]


def test_plain_has_what_families_have():
    configs = [validate(replace(CONFIG, model=replace(CONFIG.model, **model)), 1) for model in FAMILIES]
    (found,) = run_distributed(rank_losses_of_each, 1, configs)
    for losses in found:
        assert all(ours == pytest.approx(theirs, rel=1e-4) for ours, theirs in losses)


@pytest.mark.parametrize(("name", "recompute"), [("plain", "selective"), ("transformers", "full")])
def test_other_recompute_is_refused(name, recompute):
    config = replace(CONFIG, trainer=replace(CONFIG.trainer, recompute_granularity=recompute))
    with pytest.raises(ValueError, match="use recompute_granularity=none"):
        FACTORIES[name](config, torch.device("cpu"))


@pytest.mark.parametrize("model", [*FAMILIES, dict(norm_position="after"), dict(no_rope_freq=2)])
def test_transformers_refuses_what_llama_is_not(model):
    config = replace(CONFIG, model=replace(CONFIG.model, **model))
    with pytest.raises(ValueError, match="no biases, norms of q and k or after sublayers, rotary scaling or"):
        _transformers(validate(config, 1))
