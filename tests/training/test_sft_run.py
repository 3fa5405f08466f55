"""Conversations from JSONL to a training step, against transformers' own rendering and a dense model."""

from pathlib import Path

import pytest
import torch
from dense import DenseGPT
from distributed import run_distributed
from runs import overrides
from test_data_runs import first_step
from tuning import T, by_transformers, prepare_chats

from megatsp.compose import compose
from megatsp.data.splits import load_splits
from megatsp.data.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_chats(tmp_path_factory.mktemp("sft"))


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
