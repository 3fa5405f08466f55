"""Texts that the model continues while it is trained: they change nothing, and are what `generate` gives."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from distributed import run_distributed
from runs import command, losses, overrides, start_training, train_on_ranks, write_corpus
from waiting import LIMIT_S

from megatsp.axes import Axes
from megatsp.checkpoint.state import RunState
from megatsp.compose import compose
from megatsp.data.tokenizer import ByteTokenizer
from megatsp.model.parallelize import build_model
from megatsp.training.events import read_objects
from megatsp.training.generate import generate
from megatsp.training.samples import append_samples, drop_after, sample_line
from megatsp.training.sampling import check_prompts, is_due, make_samples
from megatsp.validate import validate

MESHES = [
    (4, ["parallel.tsp=2", "parallel.dp_shard=2"]),
    (4, ["parallel.tp=2", "parallel.dp_replicate=2"]),
]


@pytest.mark.parametrize(("ranks", "mesh"), MESHES)
def test_samples_change_no_bit_of_the_training(tmp_path, ranks, mesh):
    write_corpus(tmp_path / "corpus")
    given = overrides(tmp_path / "corpus", tmp_path, *mesh, "trainer.micro_batch_size=1")
    prompts = "logging.sample_prompts=['the sun','']"
    asks = ["logging.sample_interval=3", "logging.sample_tokens=5", prompts]
    runs = [[*given, "name=without"], [*given, "name=with", *asks]]
    without, with_samples = train_on_ranks(ranks, *runs)
    assert losses(without) == losses(with_samples) and len(losses(without)) == 10
    made = read_objects(tmp_path / "with" / "samples.jsonl")
    assert [(s["iteration"], s["prompt"]) for s in made] == [
        (i, p) for i in (3, 6, 9) for p in ("the sun", "")
    ]
    assert not (tmp_path / "without" / "samples.jsonl").exists()


def test_a_sample_is_what_the_command_gives(tmp_path):
    write_corpus(tmp_path / "corpus")
    asks = ["logging.sample_interval=10", "logging.sample_tokens=8", "logging.sample_prompts=['the ']"]
    train_on_ranks(1, overrides(tmp_path / "corpus", tmp_path, *asks))
    job = command("generate", str(tmp_path / "run"), "--prompt", "the ", "--tokens", "8")
    out, err = job.communicate(timeout=LIMIT_S)
    (sample,) = read_objects(tmp_path / "run" / "samples.jsonl")
    assert (job.returncode, out) == (0, f"the {sample['continuation']}\n"), err


def diverge(folder: Path) -> None:
    config = validate(compose(overrides(folder / "corpus", folder, "parallel.tsp=2")), 2)
    axes = Axes.build(config.parallel, torch.device("cpu"))
    gpt = build_model(config, axes)
    with torch.no_grad():
        gpt.model.norm.weight.to_local().fill_(float("inf"))
    assert make_samples(gpt, axes, ByteTokenizer(), config, lambda what: None) == []
    with pytest.raises(ValueError, match="logits are not finite: its weights have diverged"):
        generate(gpt, axes, ByteTokenizer(), "the ", 2, 0.0, 1, 24)


def test_a_model_that_has_diverged_is_not_sampled(tmp_path):
    run_distributed(diverge, 2, tmp_path)


def test_no_sample_is_due_amid_bad_steps():
    config = compose(["logging.sample_interval=3"])
    state = RunState(iteration=6)
    assert is_due(config, state, 3) and not is_due(config, replace(state, bad_steps_in_a_row=1), 3)


def test_a_prompt_that_does_not_fit_is_refused_before_anything_is_written(tmp_path):
    write_corpus(tmp_path / "corpus")
    given = overrides(tmp_path / "corpus", tmp_path, "logging.sample_interval=1", "logging.sample_tokens=8")
    config = compose([*given, f"logging.sample_prompts=['{'a' * 25}']"])
    with pytest.raises(
        ValueError, match="has 25 tokens, which with sample_tokens=8 is more than trainer.seq_"
    ):
        check_prompts(config, ByteTokenizer())
    check_prompts(replace(config, trainer=replace(config.trainer, seq_length=64)), ByteTokenizer())
    with pytest.raises(AssertionError, match="logging.sample_prompts: 'aaaaa"):
        run_distributed(start_training, 1, config)
    assert not (tmp_path / "run").exists()


SETTINGS = [
    ("logging.sample_prompts=[]", "logging.sample_prompts=[]: name a text to continue"),
    ("logging.sample_tokens=32", "logging.sample_tokens=32: must be below trainer.seq_length=32"),
    ("logging.wandb_artifacts=true", "logging.wandb_artifacts=true: only `megatsp sft` exports a model"),
]


@pytest.mark.parametrize(("setting", "message"), SETTINGS)
def test_settings_that_contradict_are_refused(setting, message):
    given = overrides(Path("corpus"), Path("outputs"), "logging.sample_interval=1", "logging.sample_tokens=8")
    with pytest.raises(ValueError, match="cannot run with") as error:
        validate(compose([*given, setting]), 1)
    assert message in str(error.value)


def test_samples_after_the_checkpoint_are_dropped(tmp_path):
    for iteration in (2, 4, 6):
        append_samples(tmp_path, iteration, [{"prompt": "a", "continuation": "b"}])
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write('{"iteration": 8, "pro')
    assert drop_after(tmp_path, 5) == 4
    append_samples(tmp_path, 6, [{"prompt": "a", "continuation": "c"}])
    assert [entry["iteration"] for entry in read_objects(tmp_path / "samples.jsonl")] == [2, 4, 6]


def test_a_line_of_the_log_is_one_line():
    line = sample_line(7, {"prompt": "a\nb", "continuation": "c\n" * 400})
    assert line.startswith(" sample at iteration 7: 'a\\nb' goes on 'c\\nc") and line.endswith("...")
    assert len(line) < 200 and line.isprintable()
