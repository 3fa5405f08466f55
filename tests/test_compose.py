"""Groups and overrides become the typed configuration; every mistake names what was meant."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from megatsp.compose import compose, config_dir, from_yaml, group_choices, key_paths, to_yaml
from megatsp.schema import Config, ModelConfig, ParallelConfig, RotaryScaling
from megatsp.validate import validate

SFT_EXPERIMENTS = ("sft_example", "lora_example", "sft_qwen3_8b_128k", "lora_qwen3_8b_32k")


def error(*overrides: str, user_dir: Path | None = None) -> str:
    with pytest.raises(ValueError) as caught:
        compose(list(overrides), user_dir)
    return str(caught.value)


def user_folder(folder: Path, text: str, name: str = "experiment/mine.yaml") -> Path:
    """A --config-dir that holds one file."""
    file = folder / name
    file.parent.mkdir(parents=True)
    file.write_text(text)
    return folder


def test_no_override_gives_the_schemas_defaults_over_all_ranks():
    assert compose([]) == Config(parallel=ParallelConfig(tsp=-1))


def test_a_group_a_key_and_an_experiment():
    config = compose(["experiment=quickstart", "parallel.tsp=4", "trainer.train_iters=50", "optimizer.lr=1"])
    assert (config.name, config.scheduler.lr_warmup_iters, config.launch.nproc) == ("quickstart", 20, 2)
    assert (config.parallel.tsp, config.trainer.train_iters) == (4, 50)
    assert type(config.optimizer.lr) is float  # a whole number is a number
    assert compose(["model=gpt_7b", "model.num_layers=2"]).model == replace(
        compose(["model=gpt_7b"]).model, num_layers=2
    )


def test_the_last_override_wins():
    assert compose(["trainer.seed=1", "trainer.seed=2", "trainer=bf16"]).trainer.seed == 2


def test_a_choice_on_the_command_line_wins_over_the_experiment():
    assert compose(["experiment=quickstart", "model=gpt_7b"]).model.num_layers == 32
    assert compose(["experiment=quickstart", "scheduler=wsd"]).scheduler.lr_decay_style == "WSD"


def test_interpolation_finds_defaults_and_overrides():
    assert compose(["name=t${trainer.seq_length}", "trainer.seq_length=512"]).name == "t512"


def test_mapping_override():
    scaling = compose(["model.rotary_scaling={type: linear, factor: 2}"]).model.rotary_scaling
    assert (scaling.type, scaling.factor, scaling.high_freq_factor) == ("linear", 2.0, 4.0)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.trian_iters=5", "unknown key trainer.trian_iters; did you mean trainer.train_iters?"),
        ("num_layers=5", "unknown key num_layers; did you mean model.num_layers?"),
        ("modle=gpt_7b", "unknown key modle; did you mean model?"),
        ("model.num_layers.x=1", "unknown key model.num_layers.x; did you mean model.num_layers?"),
        ("zzz=1", "unknown key zzz"),
        ("hydra.run.dir=x", "unknown key hydra.run.dir"),
        ("model.rotary_scaling={facto: 2}", "did you mean model.rotary_scaling.factor?"),
        ("trainer=null", "unknown choice trainer=null (choices of trainer: bf16, default)"),
        ("trainer.train_iters=1.5", "trainer.train_iters=1.5: expected a whole number, got float"),
        ("trainer.train_iters=true", "trainer.train_iters=true: expected a whole number, got bool"),
        ("trainer.train_iters=null", "trainer.train_iters=null: expected a whole number, got null"),
        ("optimizer.lr=fast", "optimizer.lr=fast: expected a number, got str"),
        ("model.qk_layernorm=1", "model.qk_layernorm=1: expected true or false, got int"),
        ("name=5", """name=5: expected text, got int; quote it: '"5"'"""),
        ("model.rotary_scaling=3", "model.rotary_scaling=3: expected a mapping of keys"),
        ("name=${nowhere}", "Interpolation key 'nowhere' not found"),
        ("trainer.train_iters", "cannot read the override 'trainer.train_iters'"),
        ("=5", "cannot read the override '=5'"),
        ("a b=5", "cannot read the override 'a b=5'"),
        ("~trainer", "cannot read the override '~trainer'"),
        ("model@x=gpt_7b", "cannot read the override 'model@x=gpt_7b'"),
        ("parallel.tsp=1,2", "gives several values; give one"),
    ],
)
def test_mistakes_in_overrides(override, message):
    assert message in error(override)


def test_an_unknown_choice_lists_the_nearest_and_all():
    assert error("model=gpt_7bb") == (
        "unknown choice model=gpt_7bb; did you mean gpt_7b? "
        f"(choices of model: {', '.join(group_choices()['model'])})"
    )


def test_quoted_numbers_are_text():
    assert compose(['name="007"']).name == "007"


def test_a_folder_of_the_users(tmp_path):
    folder = user_folder(
        tmp_path / 'has, "odd" [name]',
        "# @package _global_\ndefaults:\n  - override /model: gpt_1b\nname: mine\ntrainer: {seed: 7}\n",
    )
    config = compose(["experiment=mine", "trainer.train_iters=9"], folder)
    assert (config.name, config.model.num_layers, config.trainer.seed) == ("mine", 16, 7)
    assert config.trainer.train_iters == 9
    assert "mine" in group_choices(folder)["experiment"] and "mine" not in group_choices()["experiment"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trainer: {trian_iters: 5}", "unknown key trainer.trian_iters; did you mean trainer.train_iters?"),
        ("traner: {train_iters: 5}", "unknown key traner; did you mean trainer?"),
        ("trainer: {train_iters: 1.5}", "trainer.train_iters=1.5: expected a whole number, got float"),
        ("trainer:", "trainer=null: expected a mapping of keys"),
        ("trainer: {train_iters", "cannot compose the configuration"),
        (
            "defaults:\n  - override /model: gpt_7bb",
            "no configuration file model/gpt_7bb; did you mean gpt_7b?",
        ),
    ],
)
def test_mistakes_in_the_users_files(tmp_path, text, message):
    folder = user_folder(tmp_path / "mine", f"# @package _global_\n{text}\n")
    assert message in error("experiment=mine", user_dir=folder)


def test_a_users_folder_must_add_something(tmp_path):
    assert "no group in it" in error(user_dir=tmp_path / "missing")
    folder = user_folder(tmp_path / "shadow", "lr: 1.0", "optimizer/adamw.yaml")
    assert "optimizer/adamw.yaml exists in megatsp too" in error(user_dir=folder)


def test_all_mistakes_in_values_are_reported_together():
    assert len(error("trainer.seed=x", "name=5", "optimizer.lr=null").splitlines()) == 3


def test_nothing_is_written_and_the_folder_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    compose(["experiment=quickstart"])
    assert Path.cwd() == tmp_path and os.listdir(tmp_path) == []


@dataclass(frozen=True)
class Source:
    """What compose asks of a Hugging Face checkpoint."""

    model: ModelConfig
    folder: str = "theirs"


@pytest.fixture
def qwen3_8b(monkeypatch: pytest.MonkeyPatch) -> ModelConfig:
    """The keys of Qwen3-8B, whatever finetune.hf names."""
    model = ModelConfig(
        num_layers=36, hidden_size=4096, ffn_hidden_size=12288, num_attention_heads=32, num_query_groups=8,
        kv_channels=128, vocab_size=151936, rotary_base=1e6, norm_epsilon=1e-6, qk_layernorm=True,
        untie_embeddings_and_output_weights=True, max_position_embeddings=40960,
    )  # fmt: skip
    monkeypatch.setattr("megatsp.compose.open_source", lambda name: Source(model))
    return model


def test_sft_takes_the_model_of_its_checkpoint(qwen3_8b):
    def sft(*overrides: str) -> Config:
        return compose(["finetune.hf=theirs", *overrides], primary="sft")

    config = sft("data.path=chats")
    assert config.model == qwen3_8b and config.data.tokenizer == "theirs" and config.optimizer.lr == 1e-5
    assert sft("data=ultrachat").data.path == ["outputs/data/ultrachat/train_chat_document"]
    assert sft("finetune=lora").finetune.lora_rank == 16 and sft("finetune=lora").optimizer.lr == 2e-4
    assert sft("name=h${model.hidden_size}").name == "h4096"
    assert sft("model.hidden_size=4096").model == qwen3_8b  # the same is no change
    # A longer context: what is said by name, and what follows from it.
    scaled = sft("trainer.seq_length=81920", "model.rotary_scaling={type: yarn, factor: 2}").model
    assert scaled.max_position_embeddings == 81920
    assert scaled.rotary_scaling == RotaryScaling("yarn", 2.0, original_max_position_embeddings=40960)
    assert sft("trainer.seq_length=81920", "model.rotary_base=4e6").model.max_position_embeddings == 81920
    named = sft("trainer.seq_length=81920", "model.max_position_embeddings=100000").model
    assert named == replace(qwen3_8b, max_position_embeddings=100000)
    assert sft("model.rotary_base=4e6").model == replace(qwen3_8b, rotary_base=4e6)


@pytest.mark.parametrize("name", SFT_EXPERIMENTS)
def test_experiments_of_sft_are_valid(qwen3_8b, name):
    config = compose([f"experiment={name}", "data.path=chats"], primary="sft")
    filled = validate(config, config.launch.nproc)
    assert from_yaml(to_yaml(filled)) == filled and config.finetune.hf
    if name == "sft_qwen3_8b_128k":
        rotary = config.model.rotary_scaling
        assert (rotary.type, rotary.factor, rotary.original_max_position_embeddings) == ("yarn", 4.0, 32768)
        assert config.model.max_position_embeddings == config.trainer.seq_length == 131072


def test_every_choice_of_every_group_is_valid():
    assert "finetune" not in group_choices() and "model" not in group_choices(primary="sft")
    for group, names in group_choices().items():
        assert names, group
        for name in names:
            if name in SFT_EXPERIMENTS:
                continue
            config = compose([f"{group}={name}", "trainer.global_batch_size=64"])
            filled = validate(config, 2 if group == "parallel" else config.launch.nproc)
            assert from_yaml(to_yaml(filled)) == filled


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        ("gpt_tiny", 0.82e6),
        ("gpt_125m", 124e6),
        ("gpt_1b", 1.11e9),
        ("gpt_7b", 8.85e9),
        ("llama3_8b", 8.03e9),
    ],
)
def test_model_sizes(model, parameters):
    m = compose([f"model={model}"]).model
    heads = m.num_attention_heads + m.num_query_groups  # q and o; k and v
    layer = 2 * m.hidden_size * heads * m.kv_channels + 3 * m.hidden_size * m.ffn_hidden_size
    embeddings = (1 + m.untie_embeddings_and_output_weights) * m.vocab_size * m.hidden_size
    assert m.num_layers * layer + embeddings == pytest.approx(parameters, rel=0.01)
    if model == "gpt_7b":  # the paper's 8.6e9
        assert m.num_layers * layer == pytest.approx(8.59e9, rel=0.001)


@pytest.mark.parametrize(
    "text", ["1e5", "007", "true", "null", "a: b", "${x}", "# no comment", "ünïcode", ""]
)
def test_yaml_gives_back_any_text(text):
    config = replace(Config(), output_dir=text)
    assert from_yaml(to_yaml(config)) == config


@pytest.mark.parametrize("number", [1e-5, 3e-4, 1.0, 1e20, 0.1 + 0.2])
def test_yaml_gives_back_any_number(number):
    config = replace(Config(), optimizer=replace(Config().optimizer, lr=number))
    assert from_yaml(to_yaml(config)) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trainer: {trian_iters: 5}", "did you mean trainer.train_iters?"),
        ("- a", "expected a YAML mapping"),
        ("a: [", "not a configuration in YAML"),
        ("name: !!python/object/apply:os.getcwd []", "not a configuration in YAML"),
    ],
)
def test_bad_yaml(text, message):
    with pytest.raises(ValueError) as caught:
        from_yaml(text)
    assert message in str(caught.value)


def test_paths_and_config_dir():
    assert {"model.rotary_scaling.factor", "model.rotary_scaling", "name"} <= set(key_paths())
    assert (config_dir() / "train.yaml").is_file()
