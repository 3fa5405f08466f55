"""What tests of `megatsp sft` share: a checkpoint by transformers, conversations, a tiny run's settings."""

import json
from pathlib import Path

import torch
from chat_tokenizers import CHATML_GENERATION, save_tokenizer
from runs import TINY
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from megatsp import cli
from megatsp.compose import compose
from megatsp.schema import Config

TURNS = (
    "Why is the sea salt?",
    "Rivers bring it.",
    "And lakes?",
    "They have a way out, so it does not stay.",
)
T = 192  # longer than a conversation of four turns, shorter than one of eight


def save_checkpoint(folder: Path, tokenizer: Path | None = None, **more: object) -> Path:
    """A Qwen3 with two layers and random weights, with more keys if its tokenizer."""
    torch.manual_seed(5)
    config = Qwen3Config(
        vocab_size=367, hidden_size=32, intermediate_size=45, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=T, initializer_range=0.2,
        bos_token_id=None, eos_token_id=2, **more,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    if tokenizer is not None:
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


def prepare_chats(folder: Path) -> Path:
    """Conversations of two to eight turns, prepared, and in `folder`/tokenizer one with a template."""
    save_tokenizer(folder / "tokenizer", CHATML_GENERATION)
    with (folder / "chats.jsonl").open("w") as file:
        for i in range(20):
            roles = ("user", "assistant") * (1 + i % 4)
            messages = [{"role": r, "content": f"{TURNS[j % 4]} {i}"} for j, r in enumerate(roles)]
            file.write(json.dumps({"messages": messages}) + "\n")
    arguments = ["--input", f"{folder}/chats.jsonl", "--format", "chat", "--tokenizer", f"{folder}/tokenizer"]
    assert cli.main(["preprocess", *arguments, "--output-prefix", f"{folder}/chats"]) == 0
    return folder


def settings(folder: Path, *more: str) -> list[str]:
    """The arguments of `megatsp sft` for a tiny run on `prepare_chats` and a checkpoint beside them."""
    of_training = [text for text in TINY if not text.startswith("model.")]
    return [
        *of_training, f"finetune.hf={folder}/hf", f"data.path={folder}/chats_chat_document",
        f"output_dir={folder}", "trainer.dtype=fp32", f"trainer.seq_length={T}", *more,
    ]  # fmt: skip


def tuning(folder: Path, *more: str) -> Config:
    return compose(settings(folder, *more), primary="sft")


def by_transformers(folder: Path, last_only: bool = False) -> list[tuple[list[int], list[int]]]:
    """Each conversation's ids, and 1 where they are the assistant's."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    found = []
    for line in (folder / "chats.jsonl").read_text().splitlines():
        rendered = tokenizer.apply_chat_template(
            json.loads(line)["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = rendered["input_ids"], rendered["assistant_masks"]
        if last_only:
            before = len(mask) - next(i for i, m in enumerate(mask[::-1]) if m)  # after the last turn
            start = max(i for i in range(before) if i == 0 or not mask[i - 1])
            mask = [m if start <= i < before else 0 for i, m in enumerate(mask)]
        found.append((list(ids), list(mask)))
    return found
