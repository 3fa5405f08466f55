"""Conversations from JSONL to a training step, against transformers' own rendering and a dense model."""

import json
from pathlib import Path

import pytest
import torch
from chat_tokenizers import CHATML_GENERATION, save_tokenizer
from dense import DenseGPT
from distributed import run_distributed
from runs import overrides
from test_data_runs import first_step
from transformers import AutoTokenizer

from megatsp import cli
from megatsp.compose import compose
from megatsp.data.splits import load_splits
from megatsp.data.tokenizer import load_tokenizer

TURNS = (
    "Why is the sea salt?",
    "Rivers bring it.",
    "And lakes?",
    "They have a way out, so it does not stay.",
)
T = 192


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with a template, and conversations of two to eight turns, prepared."""
    folder = tmp_path_factory.mktemp("sft")
    save_tokenizer(folder / "tokenizer", CHATML_GENERATION)
    with (folder / "chats.jsonl").open("w") as file:
        for i in range(20):
            roles = ("user", "assistant") * (1 + i % 4)
            messages = [{"role": r, "content": f"{TURNS[j % 4]} {i}"} for j, r in enumerate(roles)]
            file.write(json.dumps({"messages": messages}) + "\n")
    arguments = ["--input", f"{folder}/chats.jsonl", "--format", "chat", "--tokenizer", f"{folder}/tokenizer"]
    assert cli.main(["preprocess", *arguments, "--output-prefix", f"{folder}/chats"]) == 0
    return folder


def by_transformers(folder: Path, last_only: bool) -> list[tuple[list[int], list[int]]]:
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


@pytest.mark.parametrize("world_size, more", [(1, []), (2, ["parallel.tsp=2"])])
def test_the_loss_is_that_of_the_assistants_tokens_alone(folder, world_size, more):
    settings = overrides(
        folder / "chats_chat_document", folder, f"data.tokenizer={folder}/tokenizer", "data.valid_fraction=0",
        "data.long_documents=truncate", f"trainer.seq_length={T}", "model.vocab_size=1000",
        "model.init_method_std=0.5", "name=unsaved",
    )  # fmt: skip
    ways = [(p, on) for p in ("best_fit", "pad") for on in ("auto", "last")]
    configs = [
        compose([*settings, f"data.packing={packing}", f"data.loss_on={on}", *more]) for packing, on in ways
    ]
    steps = run_distributed(first_step, world_size, configs)[0]
    for config, (_, on), (loss, weights) in zip(configs, ways, steps, strict=True):
        expected = by_transformers(folder, on == "last")
        train = load_splits(config, load_tokenizer(config.data.tokenizer)).train
        pieces = [p for d in train.draw(0, 4) for p in train.sources[0].samples.pieces(d.sample)]
        dense = DenseGPT(config.model)
        dense.load_state_dict({name: weights[name] for name in dense.state_dict()})
        nats, tokens = 0.0, 0
        for document, offset, length in pieces:
            ids, mask = (torch.tensor(column)[None] for column in expected[document])
            assert offset == 0 and length == min(ids.shape[1] - 1, T)
            losses = dense.losses(ids[:, :length], ids[:, 1 : length + 1])
            nats += (losses * mask[:, 1 : length + 1]).sum().item()
            tokens += mask[:, 1 : length + 1].sum().item()
        assert 0 < tokens < sum(piece.length for piece in pieces)
        assert loss == pytest.approx(nats / tokens, rel=1e-6)
