"""Makes a small Hugging Face checkpoint with random weights, to try `megatsp sft` without a download.

    python scripts/make_hf_checkpoint.py qwen3 FOLDER --tokenizer TOKENIZER [--chat-template FILE]

Architectures are transformers' own, a few hundred thousand parameters each. The folder is what
`save_pretrained` writes: weights, config.json, generation_config.json, tokenizer.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

# By family: transformers' model type, and what its configuration has beside the sizes of all.
FAMILIES = {
    "llama": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
    "smollm": ("llama", {"tie_word_embeddings": True}),
    "olmo2": ("olmo2", {}),
}
END_OF_TURN = "<|im_end|>"  # ChatML's


def make(
    family: str, folder: Path, tokenizer: Path, template: Path | None = None, h: int = 128, layers: int = 4
) -> None:
    """Writes the folder. h: the residual width."""
    text = PreTrainedTokenizerFast.from_pretrained(tokenizer)
    if template is not None:
        text.chat_template = template.read_text()
    kind, more = FAMILIES[family]
    config = AutoConfig.for_model(
        kind, vocab_size=len(text), hidden_size=h, intermediate_size=3 * h, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=h // 4, max_position_embeddings=512,
        bos_token_id=None, pad_token_id=None, eos_token_id=text.eos_token_id, **more,
    )  # fmt: skip
    torch.manual_seed(1234)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    ends = [text.eos_token_id, text.convert_tokens_to_ids(END_OF_TURN)]
    model.generation_config.eos_token_id = [i for i in ends if i is not None]
    model.save_pretrained(folder)
    text.save_pretrained(folder)
    print(f"{folder}: {family}, {model.num_parameters():,} random parameters")


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="a folder with a tokenizer.json")
    parser.add_argument("--chat-template", type=Path, help="a Jinja file, for a tokenizer that has none")
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    given = parser.parse_args()
    make(
        given.family, given.folder, given.tokenizer, given.chat_template, given.hidden_size, given.layers
    )  # fmt: skip


if __name__ == "__main__":
    main()
