"""`megatsp sft` as it is typed: tuned, given back, continued by `megatsp generate`; and what it refuses."""

from pathlib import Path

import pytest
from runs import command
from tuning import prepare_chats, save_checkpoint, settings, tuning
from waiting import LIMIT_S

from megatsp import cli
from megatsp.schema import RotaryScaling


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = prepare_chats(tmp_path_factory.mktemp("sft"))
    save_checkpoint(folder / "hf", folder / "tokenizer")
    return folder


def finished(*arguments: str) -> str:
    job = command(*arguments)
    out, err = job.communicate(timeout=LIMIT_S)
    assert job.returncode == 0 and err == "", out + err
    return out


def test_the_command_tunes_gives_back_and_generates(folder):
    more = ["finetune=lora", "finetune.lora_rank=4", "trainer.train_iters=2", "launch.nproc=2", "name=run"]
    out = finished("sft", *settings(folder, *more, "trainer.eval_interval=1", "scheduler.lr_warmup_iters=0"))
    assert f"tunes {folder}/hf: adapters of rank 4 on q_proj" in out
    assert "verified: logits against transformers (fp32, 128 tokens): the same" in out
    assert f"exported:   {folder}/run/adapter, from iter_0000002" in out
    assert (folder / "run" / "adapter" / "adapter_model.safetensors").is_file()
    asked = ["generate", f"{folder}/run", "--prompt", "the sea", "--tokens", "4", "--temperature", "0"]
    assert finished(*asked, "--checkpoint", "best", "--nproc", "2").startswith("the sea")


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main([*arguments]) == 2
    return capsys.readouterr().err


def test_what_is_refused(folder, capsys):
    def refused(*more: str) -> str:
        return said(capsys, "sft", *settings(folder, *more))

    assert "finetune.hf is missing: the folder of a Hugging Face checkpoint" in said(capsys, "sft")
    assert "no checkpoint at nowhere" in refused("finetune.hf=nowhere")
    message = refused("model.num_layers=3", "model.kv_channels=4")
    assert "model.num_layers: 2 there, 3 here; model.kv_channels: 8 there, 4 here. Leave these" in message
    assert "model=gpt_tiny chooses a model, and `megatsp sft` tunes that of" in refused("model=gpt_tiny")
    assert "the experiment overrides /model, which chooses a model" in refused("experiment=quickstart")
    message = refused("trainer.seq_length=384")
    assert "has a context of 192 tokens. Extend it by model.rotary_scaling.type=yarn" in message
    assert "model.rotary_scaling.factor=2," in message
    yarn = ["model.rotary_scaling.type=yarn", "model.rotary_scaling.factor=2"]
    message = refused("trainer.seq_length=768", *yarn)
    assert "factor 2 of original_max_position_embeddings=192 reaches 384 tokens" in message
    assert "set model.rotary_scaling.factor=4" in message
    message = refused("trainer.seq_length=384", "model.max_position_embeddings=200")
    assert "model.max_position_embeddings=200: trainer.seq_length=384 is longer" in message
    message = refused("data.path=mine/chats.jsonl.zst", "data.valid_path=more.parquet")
    assert (
        f"first run `megatsp preprocess --format chat --tokenizer {folder}/hf --input mine/chats.jsonl.zst "
        "--output-prefix mine/chats`, then give mine/chats_chat_document" in message
    )
    assert "data.valid_path=more.parquet is text" in message
    assert "data.path is empty: give a path" in refused("data.path=[]")
    train = ["finetune.hf=x", "finetune.lora_rank=4", "finetune.export=last"]
    for override in train:
        assert "use `megatsp sft`" in said(capsys, "train", override)
    assert "finetune=lora tunes a Hugging Face checkpoint: that is" in said(capsys, "train", "finetune=lora")
    assert "the experiment overrides /finetune" in said(capsys, "train", "experiment=lora_qwen3_8b_32k")
    assert "--checkpoint first: give last, best or an" in said(
        capsys, "generate", str(folder), "--checkpoint", "first"
    )


def test_a_scaled_context_is_stretched_by_its_own_factor(tmp_path, folder):
    rope = dict(rope_type="linear", rope_theta=1e4, factor=3.0)
    save_checkpoint(tmp_path / "scaled", folder / "tokenizer", rope_parameters=rope)
    asked = [f"finetune.hf={tmp_path}/scaled", "trainer.seq_length=384"]
    with pytest.raises(ValueError, match=r"Extend it by model.rotary_scaling.factor=6 \(its linear has 3\)"):
        tuning(folder, *asked)
    model = tuning(folder, *asked, "model.rotary_scaling.factor=6").model
    assert (model.rotary_scaling.factor, model.max_position_embeddings) == (6.0, 384)


def test_another_scaling_begins_anew(tmp_path, folder):
    yarn = dict(rope_type="yarn", rope_theta=1e4, factor=2.0, original_max_position_embeddings=96)
    save_checkpoint(
        tmp_path / "yarn", folder / "tokenizer", rope_parameters={**yarn, "attention_factor": 1.3}
    )
    scaling = "model.rotary_scaling"
    asked = [f"finetune.hf={tmp_path}/yarn", "trainer.seq_length=384"]
    with pytest.raises(ValueError, match=r"attention_factor=1.3 goes with its factor 2; set"):
        tuning(folder, *asked, f"{scaling}.factor=4")
    found = tuning(folder, *asked, f"{scaling}.factor=4", f"{scaling}.attention_factor=0").model
    assert found.rotary_scaling == RotaryScaling("yarn", 4.0, original_max_position_embeddings=96)
    found = tuning(folder, *asked, f"{scaling}.type=linear", f"{scaling}.factor=3").model
    assert found.rotary_scaling == RotaryScaling("linear", 3.0, original_max_position_embeddings=96)
    found = tuning(folder, *asked, f"{scaling}.type=none", "model.rotary_base=1e6").model
    assert found.rotary_scaling == RotaryScaling()


def test_a_home_folder_is_found(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    assert tuning(folder, "finetune.hf=~/hf").finetune.hf == str(folder / "hf")


def test_help_and_dry_run(folder, capsys):
    assert cli.main(["sft", "--help"]) == 0
    text = capsys.readouterr().out
    assert "optimizer.lr: float = 1e-05" in text and "trainer.dtype: str = bf16" in text
    assert "model.rotary_base: float = the checkpoint's" in text and "model.num_layers" not in text
    assert "usage: megatsp sft [--help]" in text and "finetune     full, lora" in text
    assert "finetune.hf: str" in text and "\n  model        " not in text
    lora = ["finetune=lora", "finetune.lora_targets=[q_proj,k_proj]", "finetune.lora_rank=3"]
    assert cli.main(["sft", "--dry-run", *settings(folder, *lora)]) == 0
    text = capsys.readouterr().out
    count = 2 * 3 * ((32 + 32) + (32 + 16))
    assert f"tunes            {folder}/hf\n" in text and "num_layers: 2" in text
    assert f"trained          {count:,} in adapters of rank 3 on q_proj, k_proj" in text
    assert f"gives back       the best checkpoint, as {folder}/sft/adapter (PEFT)\n" in text
