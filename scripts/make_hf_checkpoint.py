"""Makes a small Hugging Face checkpoint with random weights, to try `megatsp sft` without a download.

    python scripts/make_hf_checkpoint.py qwen3 FOLDER --tokenizer TOKENIZER [--chat-template FILE]

Architectures are transformers' own, a few hundred thousand parameters each. The folder is what
`save_pretrained` writes: weights, config.json, generation_config.json, tokenizer.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, set_seed

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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="a folder with a tokenizer.json")
    parser.add_argument("--chat-template", type=Path, help="a Jinja file, for a tokenizer that has none")
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1234)
    given = parser.parse_args()

    tokenizer = PreTrainedTokenizerFast.from_pretrained(given.tokenizer)
    if given.chat_template:
        tokenizer.chat_template = given.chat_template.read_text()
    kind, more = FAMILIES[given.family]
    config = AutoConfig.for_model(
        kind,
        vocab_size=len(tokenizer),
        hidden_size=given.hidden_size,
        intermediate_size=3 * given.hidden_size,
        num_hidden_layers=given.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=given.hidden_size // 4,
        max_position_embeddings=512,
        bos_token_id=None,
        pad_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        **more,
    )
    set_seed(given.seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END_OF_TURN)]
    model.generation_config.eos_token_id = [i for i in ends if i is not None]
    model.save_pretrained(given.folder)
    tokenizer.save_pretrained(given.folder)
    print(f"{given.folder}: {given.family}, {model.num_parameters():,} random parameters")


if __name__ == "__main__":
    main()
