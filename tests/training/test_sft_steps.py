"""`megatsp sft` on two ranks against a loop of transformers and torch's AdamW on the same conversations."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_distributed
from runs import full_state, start_training
from torch import Tensor
from transformers import Qwen3ForCausalLM
from tuning import T, by_transformers, prepare_chats, save_checkpoint, tuning

from megatsp.data.blend import Draw
from megatsp.data.splits import Splits, load_splits
from megatsp.data.tokenizer import load_tokenizer
from megatsp.schema import Config
from megatsp.training.ranks import on_device, sum_over_ranks
from megatsp.training.schedule import learning_rate
from megatsp.training.step import accumulate_gradients
from megatsp.validate import validate

STEPS = 3
Document = tuple[list[int], list[int]]  # ids, and 1 where they are trained


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = prepare_chats(tmp_path_factory.mktemp("sft"))
    save_checkpoint(folder / "hf", folder / "tokenizer")
    return folder


def first_steps(config: Config) -> dict[str, Any]:
    """On a rank: the loss before the first step, its gradients, and what three steps did."""
    training = start_training(config)
    assert training.data.valid is not None
    initial = training.evaluate(training.data.valid, "val")["val/lm loss"]
    loader = training.loader()
    batches = [on_device(next(loader), torch.device("cpu")) for _ in range(training.share.num_micro_batches)]
    own = torch.stack([mask.sum() for _, _, mask, _ in batches]).sum()
    accumulate_gradients(training.gpt, batches, sum_over_ranks(own))
    gradients = {}
    for name, parameter in training.gpt.named_parameters():
        assert parameter.grad is not None
        gradients[name], parameter.grad = parameter.grad.full_tensor(), None  # type: ignore[attr-defined]
    loader = training.loader()
    results = [training.step(i, loader) for i in range(1, STEPS + 1)]
    return {
        "initial": initial,
        "gradients": gradients,
        "losses": [result.loss for result in results],
        "norms": [result.grad_norm for result in results],
        "weights": full_state(training),
        "report": training.base.report if training.base else None,
    }


def documents(data: Splits, draws: Sequence[Draw], known: Sequence[Document]) -> list[tuple[Tensor, Tensor]]:
    """ids and mask of what the samples are made of: whole conversations, or their beginnings."""
    samples = data.train.sources[0].samples
    pieces = [piece for draw in draws for piece in samples.pieces(draw.sample)]
    assert all(piece.offset == 0 for piece in pieces)
    cut = [(known[piece.document], piece.length + 1) for piece in pieces]
    assert all(length in (len(ids), T + 1) for (ids, _), length in cut)
    return [(torch.tensor([ids[:n]]), torch.tensor([mask[:n]])) for (ids, mask), n in cut]


def summed_loss(model: Qwen3ForCausalLM, found: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, int]:
    """Nats of the assistant's tokens, each conversation by itself, and how many there are."""
    nats, count = torch.zeros(()), 0
    for ids, mask in found:
        logits = model(ids[:, :-1]).logits[0]
        losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        nats, count = nats + (losses * mask[0, 1:]).sum(), count + int(mask[:, 1:].sum())
    return nats, count


def test_three_steps_are_those_of_transformers_and_torch(folder):
    more = ["optimizer.weight_decay=0.1", "scheduler.min_lr=0.001", "parallel.tsp=2"]
    config = tuning(folder, *more, "optimizer.lr=0.003", "name=unsaved")
    ours = run_distributed(first_steps, 2, config)[0]
    assert ours["report"].max_difference < 1e-4 * ours["report"].scale

    config = validate(config, 2)
    data, known = load_splits(config, load_tokenizer(config.data.tokenizer)), by_transformers(folder)
    assert data.valid is not None
    model = Qwen3ForCausalLM.from_pretrained(folder / "hf", attn_implementation="eager")
    with torch.no_grad():
        samples = data.valid.sources[0].samples
        draws = data.valid.spread(config.trainer.eval_iters * config.trainer.global_batch_size)
        whole = [(known[p.document], p.length + 1) for d in draws for p in samples.pieces(d.sample)]
        found = [(torch.tensor([ids[:n]]), torch.tensor([mask[:n]])) for (ids, mask), n in whole]
        nats, count = summed_loss(model, found)
    assert ours["initial"] == pytest.approx(nats.item() / count, rel=1e-5)

    parameters = dict(model.named_parameters())
    o = config.optimizer
    groups = [
        dict(params=[p for p in parameters.values() if p.dim() > 1], weight_decay=o.weight_decay),
        dict(params=[p for p in parameters.values() if p.dim() == 1], weight_decay=0.0),
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(o.adam_beta1, o.adam_beta2), eps=o.adam_eps)
    size, total = config.trainer.global_batch_size, 0
    for step in range(STEPS):
        batch = documents(data, data.train.draw(step * size, size), known)
        total += len(batch)
        nats, count = summed_loss(model, batch)
        (nats / count).backward()
        if step == 0:
            for name, parameter in parameters.items():
                assert parameter.grad is not None
                close(ours["gradients"][name], parameter.grad)
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), o.clip_grad)
        assert norm > o.clip_grad  # so it is clipped
        assert ours["losses"][step] == pytest.approx(nats.item() / count, rel=1e-5)
        assert ours["norms"][step] == pytest.approx(norm.item(), rel=1e-5)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step + 1, o, config.scheduler)
        optimizer.step()
        optimizer.zero_grad()
    assert total > STEPS * size  # conversations were packed
    for name, parameter in parameters.items():
        close(ours["weights"][name], parameter.detach())


def close(found: Tensor, expected: Tensor) -> None:
    error = (found - expected).norm() / expected.norm()
    assert math.isfinite(error) and error < 1e-5
