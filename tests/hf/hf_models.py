"""Random checkpoints of every family, as transformers makes and saves them, with its logits and texts."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BATCH, LENGTH, PROMPT, CONTINUED = 2, 32, 5, 6

# Odd on purpose: FFN width and vocabulary divide by nothing here.
SIZES = dict(
    vocab_size=131,
    hidden_size=48,
    intermediate_size=53,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=256,
    bos_token_id=None,
    eos_token_id=130,
    pad_token_id=None,
)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64, rope_theta=10000.0)
LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=32, rope_theta=500.0,
)  # fmt: skip


@dataclass(frozen=True)
class Made:
    """A checkpoint to make. keys: of its config.json that are not those of SIZES."""

    name: str
    model_type: str
    keys: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    max_shard_size: str = "5GB"


CASES = [
    Made("llama_tied", "llama", dict(tie_word_embeddings=True), max_shard_size="20KB"),
    Made("llama3_mha", "llama", dict(num_key_value_heads=6, rope_parameters=LLAMA3)),
    Made("mistral_mqa", "mistral", dict(num_key_value_heads=1, sliding_window=None, head_dim=6)),
    Made("qwen2_bf16", "qwen2", dict(use_sliding_window=False), torch.bfloat16, "30KB"),
    Made("qwen2_yarn", "qwen2", dict(rope_parameters=YARN, tie_word_embeddings=True)),
    Made("qwen3_linear", "qwen3", dict(rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=1e4))),
    Made("qwen3_tied", "qwen3", dict(num_key_value_heads=3, tie_word_embeddings=True), torch.float16),
    Made("smollm3", "smollm3", dict(num_hidden_layers=3, no_rope_layer_interval=2)),
    Made("olmo2", "olmo2", dict(num_key_value_heads=3), torch.bfloat16),
]


def make(case: Made, folder: Path) -> None:
    """Writes the checkpoint; gains and biases are random too."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(case.model_type, **{**SIZES, **case.keys})
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(len(case.name))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
            if parameter.dim() == 1 and not name.endswith("bias"):
                parameter += 1
    model.to(case.dtype).save_pretrained(folder, max_shard_size=case.max_shard_size)


def ids() -> Tensor:
    return torch.randint(
        0, int(SIZES["vocab_size"]), (BATCH, LENGTH), generator=torch.Generator().manual_seed(3)
    )


@torch.no_grad()
def reference(folder: Path) -> tuple[Tensor, Tensor]:
    """transformers' logits of `ids()` in fp32 [B, T, V], and its greedy continuation of their beginning."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    text = model.generate(ids()[:, :PROMPT], max_new_tokens=CONTINUED, do_sample=False, eos_token_id=None)
    return model(ids()).logits, text


def write_tokenizer(folder: Path, tokens: int = 100) -> None:
    """A tokenizer.json of so many ids, of which the last ends a document."""
    import tokenizers
    from tokenizers import models

    vocabulary = {chr(33 + i): i for i in range(tokens - 1)}
    made = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    made.add_special_tokens(["<|endoftext|>"])
    made.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
