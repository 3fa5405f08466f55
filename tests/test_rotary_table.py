"""YaRN's table is transformers', and the rotation that goes back is the transpose, of a scaled table too."""

import pytest
import torch
from megatsp_kernels import rotary as triton
from transformers import Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatsp.model import rotary
from megatsp.model.gpt import has_rotary
from megatsp.schema import ModelConfig, RotaryScaling

YARN = (  # Qwen3's own, SmolLM3's, and borders that fall together, or beyond the last pair
    RotaryScaling("yarn", 4.0, original_max_position_embeddings=32768),
    RotaryScaling("yarn", 2.0, original_max_position_embeddings=65536, attention_factor=0.5),
    RotaryScaling("yarn", 3.0, original_max_position_embeddings=64, beta_fast=16.0, beta_slow=15.9),
    RotaryScaling("yarn", 8.0, original_max_position_embeddings=2**20, beta_slow=1e-9),
    RotaryScaling("yarn", 40.0, original_max_position_embeddings=4),
)


@pytest.mark.parametrize("scaling", YARN)
@pytest.mark.parametrize(("base", "width"), [(1e6, 128), (10000.0, 6)])
def test_yarn_has_the_bits_of_transformers(scaling, base, width):
    rope = {"rope_type": "yarn", "rope_theta": base, "factor": scaling.factor}
    for key in ("beta_fast", "beta_slow", "original_max_position_embeddings"):
        rope[key] = getattr(scaling, key)
    rope["attention_factor"] = scaling.attention_factor or None
    config = Qwen3Config(head_dim=width, rope_parameters=rope)
    frequencies, factor = ROPE_INIT_FUNCTIONS["yarn"](config)

    model = ModelConfig(kv_channels=width, rotary_base=base, rotary_scaling=scaling)
    assert torch.equal(rotary.inverse_frequencies(model), frequencies)
    assert rotary.attention_factor(model) == factor
    angles = torch.arange(100)[:, None] * frequencies
    for ours, function in zip(
        rotary.rotary_table(model, torch.arange(100)), (torch.cos, torch.sin), strict=True
    ):
        assert torch.equal(ours, function(angles) * factor)


@pytest.mark.parametrize("implementation", [rotary, triton])
def test_back_is_the_transpose(implementation):
    model = ModelConfig(kv_channels=6, rotary_scaling=YARN[0])
    table = rotary.rotary_table(model, torch.arange(5))
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 2, 3, 5, 6, generator=generator)
    there, back = implementation.rotate(x, *table), implementation.rotate(y, *table, inverse=True)
    torch.testing.assert_close((there * y).sum(), (x * back).sum())
    # It is not the inverse: the table is scaled.
    torch.testing.assert_close(there.norm(), x.norm() * rotary.attention_factor(model))
    assert rotary.attention_factor(model) > 1.1


def test_every_so_many_layers_the_last_has_none():
    layers = [has_rotary(ModelConfig(no_rope_freq=4), i) for i in range(9)]
    assert layers == [True, True, True, False, True, True, True, False, True]
    assert all(has_rotary(ModelConfig(), i) for i in range(9))
    assert not any(has_rotary(ModelConfig(no_rope_freq=1), i) for i in range(9))
