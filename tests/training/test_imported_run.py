"""What `megatsp convert import` wrote is a run of `megatsp train` that has not taken a step yet."""

from dataclasses import replace
from pathlib import Path

import torch
from distributed import run_distributed
from runs import full_state, overrides, start_training
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from tuning import T, prepare_chats, save_checkpoint

from megatsp.checkpoint.paths import folder_of, latest
from megatsp.compose import compose
from megatsp.hf.checkpoint import open_checkpoint
from megatsp.hf.imported import import_run
from megatsp.schema import Config


def first_and_trained(config: Config) -> tuple[dict[str, torch.Tensor], int]:
    """On a rank: the tensors that the run begins with, and how far it comes."""
    training = start_training(config)
    first = {name: tensor.clone() for name, tensor in full_state(training).items()}
    training.run()
    return first, training.state.iteration


def test_training_continues_an_import_with_zero_moments(tmp_path: Path) -> None:
    prepare_chats(tmp_path)
    hf = save_checkpoint(tmp_path / "hf", tmp_path / "tokenizer")
    AutoModelForCausalLM.from_pretrained(hf, dtype=torch.bfloat16).save_pretrained(hf)
    import_run(str(hf), tmp_path / "imported", verify=False)
    settings = [f"data.tokenizer={hf}", f"trainer.seq_length={T}", "trainer.train_iters=3", "parallel.tsp=2"]
    config = compose(overrides(tmp_path / "chats_chat_document", tmp_path, *settings, "name=imported"))
    config = replace(config, model=open_checkpoint(str(hf)).model)
    first, iteration = run_distributed(first_and_trained, 2, config)[0]
    theirs = load_file(hf / "model.safetensors")
    assert theirs.keys() == {name for name in first if not name.startswith("optimizer.")}
    for name, tensor in first.items():
        assert torch.equal(tensor, theirs[name].float() if name in theirs else torch.zeros_like(tensor)), name
    checkpoints = tmp_path / "imported" / "checkpoints"
    assert iteration == 3 and latest(checkpoints) == folder_of(checkpoints, 3)
