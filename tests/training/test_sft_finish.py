"""The course of `megatsp sft`: best checkpoint, early stopping, resuming, what is given back."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_distributed
from peft import PeftModel
from runs import StopIf, full_state, start_training
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from tuning import T, prepare_chats, save_checkpoint, tuning

from megatsp.checkpoint import paths
from megatsp.checkpoint.paths import BEST, LATEST, folder_of
from megatsp.checkpoint.state import RunState
from megatsp.checkpoint.store import read_state
from megatsp.schema import Config
from megatsp.training.best import judge, point_to_best
from megatsp.training.generate import next_token_logits
from megatsp.training.give_back import give_back
from megatsp.training.logs import read_metrics

EVERY_TWO = ["trainer.eval_interval=2", "trainer.train_iters=6", "parallel.tsp=2", "optimizer.lr=0.02"]
IDS = torch.randint(3, 356, (40,), generator=torch.Generator().manual_seed(3)).tolist()


def run_all(jobs: list[tuple[Config, int]]) -> list[dict[str, Any]]:
    """On a rank: each run, interrupted after so many steps: what became of it, and what it says to IDS."""
    found = []
    for config, steps in jobs:
        training = start_training(config)
        training.run(StopIf(lambda training=training, steps=steps: training.state.iteration >= steps))
        ended = training.is_over
        ids = list(IDS)
        logits = [next_token_logits(training.gpt, training.axes, IDS)]
        while len(ids) < len(IDS) + 6:
            ids.append(int(logits[-1].argmax()))
            logits.append(next_token_logits(training.gpt, training.axes, ids))
        found.append({"ended": ended, "state": training.state, "logits": logits[0], "greedy": ids})
        found[-1]["all"] = full_state(training)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = prepare_chats(tmp_path_factory.mktemp("sft"))
    save_checkpoint(folder / "hf", folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def configs(folder: Path) -> dict[str, Config]:
    lora = ["finetune=lora", "finetune.lora_rank=4", "finetune.lora_targets=[q_proj,down_proj]"]
    diverges = ["optimizer.lr=1", "finetune.early_stopping=2", "trainer.train_iters=8"]
    extended = ["model.rotary_scaling.type=yarn", "model.rotary_scaling.factor=2", "trainer.seq_length=256"]
    return {
        "whole": tuning(folder, *EVERY_TWO, "name=whole"),
        "parts": tuning(folder, *EVERY_TWO, "name=parts"),
        "stopped": tuning(folder, *EVERY_TWO, *diverges, "name=stopped"),
        "extended": tuning(folder, *EVERY_TWO, *extended, "trainer.train_iters=3", "name=extended"),
        "adapters": tuning(folder, *EVERY_TWO, *lora, "trainer.train_iters=4", "name=adapters"),
        "adapters in parts": tuning(folder, *EVERY_TWO, *lora, "trainer.train_iters=4", "name=adapters2"),
    }


@pytest.fixture(scope="module")
def runs(configs: dict[str, Config]) -> dict[str, dict[str, Any]]:
    """All runs on one start of two ranks."""
    jobs = {
        "whole": ("whole", 99), "interrupted": ("parts", 3), "parts": ("parts", 99),
        "stopped": ("stopped", 99), "stopped again": ("stopped", 99), "extended": ("extended", 99),
        "adapters": ("adapters", 99),
        "adapters interrupted": ("adapters in parts", 1), "adapters in parts": ("adapters in parts", 99),
    }  # fmt: skip
    results = run_distributed(run_all, 2, [(configs[name], steps) for name, steps in jobs.values()])[0]
    return dict(zip(jobs, results, strict=True))


def validation(folder: Path, name: str) -> dict[int, float]:
    entries = read_metrics(folder / name / "metrics.jsonl")
    return {e["iteration"]: e["val/lm loss"] for e in entries if "val/lm loss" in e}


def test_the_best_checkpoint_is_that_of_the_lowest_validation_loss(runs, folder):
    losses = validation(folder, "whole")
    assert list(losses) == [0, 2, 4, 6]  # from the first weights on
    best = min((loss, iteration) for iteration, loss in losses.items() if iteration)
    state = runs["whole"]["state"]
    assert runs["whole"]["ended"] and (state.best_loss, state.best_iteration) == best
    checkpoints = folder / "whole" / "checkpoints"
    assert paths.best(checkpoints) == folder_of(checkpoints, state.best_iteration)
    assert paths.chosen(checkpoints, "best") == paths.best(checkpoints)
    assert paths.latest(checkpoints) == folder_of(checkpoints, 6)
    lowest = [i for i in losses if i and all(losses[i] < losses[j] for j in losses if 0 < j < i)]
    saved = {folder_of(checkpoints, i) for i in [*lowest, 6]}
    assert {*checkpoints.glob("iter_*")} == saved and len(saved) < 4


def test_a_resumed_run_is_the_same_bit_for_bit(runs, folder):
    assert not runs["interrupted"]["ended"] and runs["interrupted"]["state"].iteration == 4
    for name, tensor in runs["whole"]["all"].items():
        assert torch.equal(tensor, runs["parts"]["all"][name]), name
    assert validation(folder, "parts") == validation(folder, "whole")
    saved = [folder / name / "checkpoints" for name in ("whole", "parts")]
    whole, parts = (read_state(folder_of(checkpoints, 6)) for checkpoints in saved)
    assert replace(whole, wandb_run_id="") == replace(parts, wandb_run_id="")
    assert (saved[0] / BEST).read_text() == (saved[1] / BEST).read_text() == f"{whole.best_iteration}\n"


def test_only_adapters_are_trained_and_saved_and_a_resumed_run_is_the_same(runs, folder):
    whole, parts = runs["adapters"], runs["adapters in parts"]
    assert runs["adapters interrupted"]["state"].iteration == 2 and parts["state"].iteration == 4
    for name, tensor in whole["all"].items():
        assert torch.equal(tensor, parts["all"][name]), name
    saved = folder_of(folder / "adapters" / "checkpoints", 4)
    names = {name for file in saved.glob("*.safetensors") for name in load_file(file)}
    assert names and all(".lora_" in name for name in names)
    owners = {name.split(".")[-3] for name in names}
    assert owners == {"q_proj", "down_proj"} and len(names) == 3 * 2 * 2 * 2  # with two moments
    before = load_file(folder / "hf" / "model.safetensors")
    assert all(torch.equal(before[name], whole["all"][name]) for name in before)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's of transformers
def test_adapters_are_given_back_as_peft_and_merged(runs, configs, folder):
    config = configs["adapters"]
    config = replace(config, finetune=replace(config.finetune, export="last", lora_merge=True))
    give_back(config, again=True)
    given = folder / "adapters"
    base = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(given / "hf", dtype=torch.float32)
    for model in (PeftModel.from_pretrained(base, given / "adapter").eval(), merged.eval()):
        with torch.no_grad():
            theirs = model(torch.tensor([IDS])).logits[0, -1]
        ours = runs["adapters"]["logits"]
        assert (ours - theirs).norm() < 1e-5 * theirs.norm()


def test_early_stopping(runs, configs, folder, capfd):
    losses, state = validation(folder, "stopped"), runs["stopped"]["state"]
    assert runs["stopped"]["ended"] and state.iteration < 8 and state.evaluations_without_gain == 2
    assert state.iteration == state.best_iteration + 4 == max(losses)
    # Resumed it did nothing: no step, no line, no checkpoint.
    assert runs["stopped again"]["ended"] and runs["stopped again"]["state"] == read_state(
        folder_of(folder / "stopped/checkpoints", state.iteration)
    )
    assert (folder / "stopped/checkpoints" / LATEST).read_text() == f"{state.iteration}\n"


def test_what_is_given_back_is_what_was_tuned(runs, configs, folder, capsys):
    config = replace(configs["extended"], finetune=replace(configs["extended"].finetune, export="last"))
    give_back(config, again=True)
    printed = capsys.readouterr().out
    assert "exported:" in printed and "iter_0000003" in printed and "the same" in printed
    exported = folder / "extended" / "hf"
    written = json.loads((exported / "config.json").read_text())
    rope = written["rope_parameters"]
    assert (rope["rope_type"], rope["factor"], rope["original_max_position_embeddings"]) == ("yarn", 2.0, T)
    assert written["max_position_embeddings"] == 256
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = model(torch.tensor([IDS])).logits[0, -1]
        greedy = model.generate(torch.tensor([IDS]), do_sample=False, max_new_tokens=6, eos_token_id=-1)
    ours = runs["extended"]["logits"]
    assert (ours - theirs).norm() < 1e-5 * theirs.norm()
    assert greedy[0].tolist() == runs["extended"]["greedy"]
    assert AutoTokenizer.from_pretrained(exported).chat_template
    tuned = load_file(exported / "model.safetensors")
    for name, tensor in runs["extended"]["all"].items():
        if not name.startswith("optimizer."):
            assert torch.equal(tensor, tuned[name]), name

    give_back(config, again=False)
    assert "already" in capsys.readouterr().out
    (folder / "whole" / "hf").mkdir()
    with pytest.raises(ValueError, match="whole/hf was there before: move it away"):
        give_back(configs["whole"], again=True)


def test_a_run_says_what_it_began_with(runs, folder):
    report = json.loads((folder / "whole" / "verification.json").read_text())
    assert report["passed"] and report["dtype"] == "fp32"
    kept = folder_of(folder / "whole" / "checkpoints", 6) / "hf" / "config.json"
    assert kept.read_bytes() == (folder / "hf" / "config.json").read_bytes()
    assert runs["whole"]["state"].base_fingerprint


def test_judgement():
    state = judge(RunState(iteration=10), 3.0)
    assert (state.best_iteration, state.best_loss, state.evaluations_without_gain) == (10, 3.0, 0)
    for loss in (3.0, 4.0, float("nan")):
        assert judge(state, loss) == replace(state, evaluations_without_gain=1)
    later = judge(replace(state, iteration=20, evaluations_without_gain=5), 2.0)
    assert (later.best_iteration, later.best_loss, later.evaluations_without_gain) == (20, 2.0, 0)
    assert judge(RunState(iteration=10), float("nan")).best_iteration == 0


def test_the_pointer_to_the_best(tmp_path):
    (tmp_path / "iter_0000010").mkdir()
    (tmp_path / "iter_0000010" / "state.json").write_text("{}")
    point_to_best(tmp_path, RunState(best_iteration=10))
    assert paths.best(tmp_path) == tmp_path / "iter_0000010"
    (tmp_path / BEST).write_text("30")
    with pytest.raises(ValueError, match=f"{BEST} says '30', but there is no such checkpoint"):
        paths.chosen(tmp_path, "best")
    point_to_best(tmp_path, RunState(best_iteration=20))  # its checkpoint is gone
    assert not (tmp_path / BEST).exists()
    with pytest.raises(ValueError, match="has no checkpoint best: only `megatsp sft` with validation data"):
        paths.chosen(tmp_path, "best")
    with pytest.raises(ValueError, match=r"has no checkpoint 7 \(there: iter_0000010\)"):
        paths.chosen(tmp_path, "7")
    assert paths.chosen(tmp_path, "10") == tmp_path / "iter_0000010"


def refused(configs: list[Config]) -> list[str]:
    """On a rank: what runs say that are not begun."""
    said = []
    for config in configs:
        with pytest.raises(ValueError) as caught:
            start_training(config)
        said.append(str(caught.value))
    return said


def test_what_is_refused_when_it_is_resumed(runs, configs, folder, tmp_path):
    save_checkpoint(tmp_path / "hf", folder / "tokenizer")
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    one = ["parallel.tsp=1"]
    changed = tuning(folder, *EVERY_TWO, *one, "name=whole", f"finetune.hf={tmp_path}/hf")
    best = runs["stopped"]["state"].best_iteration
    lost = tuning(folder, *EVERY_TWO, *one, "name=stopped")
    moved = folder_of(folder / "stopped" / "checkpoints", best).rename(tmp_path / "moved")
    with_adapters = tuning(folder, *EVERY_TWO, *one, "name=whole", "finetune.lora_rank=2")
    without = replace(changed, finetune=replace(changed.finetune, hf=""))
    said = run_distributed(refused, 1, [changed, lost, with_adapters, without])[0]
    moved.rename(folder_of(folder / "stopped" / "checkpoints", best))
    assert f"{tmp_path}/hf is not what the run tunes: its fingerprint is" in said[0]
    assert "of the lowest validation loss, is not there: restore it" in said[1]
    assert "differs in finetune.lora_rank: 0 there, 2 now" in said[2]
    assert f"finetune.hf: '{folder}/hf' there, '' now" in said[3]
