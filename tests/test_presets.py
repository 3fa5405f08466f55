"""configs/model: presets of published checkpoints have their parameters, by transformers' own models."""

import pytest
import torch
import transformers
from test_dense import hf_kwargs

from megatsp.compose import compose, group_choices
from megatsp.model.gpt import GPT, count_parameters, has_rotary
from megatsp.model.rotary import inverse_frequencies
from megatsp.schema import ModelConfig
from megatsp.validate import validate

# The family's class in transformers, and the parameters that the checkpoint's page on the hub says it has.
PUBLISHED = {
    "llama2_7b": ("Llama", 6_738_415_616),
    "llama3_8b": ("Llama", 8_030_261_248),
    "llama3_1_8b": ("Llama", 8_030_261_248),
    "llama3_2_1b": ("Llama", 1_235_814_400),
    "mistral_7b": ("Mistral", 7_248_023_552),
    "qwen2_5_7b": ("Qwen2", 7_615_616_512),
    "qwen2_5_0_5b": ("Qwen2", 494_032_768),
    "qwen3_8b": ("Qwen3", 8_190_735_360),
    "qwen3_0_6b": ("Qwen3", 596_049_920),
    "smollm2_135m": ("Llama", 134_515_008),
    "smollm2_1_7b": ("Llama", 1_711_376_384),
    "smollm3_3b": ("SmolLM3", 3_075_098_624),
    "olmo2_7b": ("Olmo2", 7_298_617_344),
}
OURS = {"gpt_125m", "gpt_1b", "gpt_7b", "gpt_tiny"}


def test_every_preset_is_tested():
    assert {*group_choices()["model"]} == OURS | PUBLISHED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_ones(name):
    family, parameters = PUBLISHED[name]
    config = compose([f"model={name}"])
    model: ModelConfig = config.model
    assert count_parameters(model) == parameters
    validate(config, 1)

    keys = hf_kwargs(model) | {"max_position_embeddings": model.max_position_embeddings}
    with torch.device("meta"):
        ours = GPT(model)
    theirs = transformers_model(family, keys)
    assert shapes(ours) == shapes(theirs)
    with torch.device("cpu"):  # what they turn by has values
        theirs_rotary = type(theirs.model.rotary_emb)(theirs.config)
    torch.testing.assert_close(inverse_frequencies(model), theirs_rotary.inv_freq, rtol=1e-6, atol=0)
    no_rotary = getattr(theirs.config, "no_rope_layers", None) or [1] * model.num_layers
    assert [int(has_rotary(model, i)) for i in range(model.num_layers)] == no_rotary


def transformers_model(family: str, keys: dict) -> transformers.PreTrainedModel:
    config = getattr(transformers, f"{family}Config")(**keys)
    with torch.device("meta"):
        return getattr(transformers, f"{family}ForCausalLM")(config)


def shapes(model: torch.nn.Module) -> dict[str, torch.Size]:
    """By name; a tied matrix once."""
    return {name: parameter.shape for name, parameter in model.named_parameters()}
