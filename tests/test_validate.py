"""Every rule of validate() with a value that breaks it, and every value that it fills in."""

from dataclasses import replace
from typing import Any

import pytest

from megatsp.schema import Config
from megatsp.validate import dp_size, validate


def configured(**values: Any) -> Config:
    """The default configuration with keys set by path, `model__hidden_size=3` for model.hidden_size."""
    config = Config()
    for path, value in values.items():
        *groups, name = path.split("__")
        nodes = [config]
        for group in groups:
            nodes.append(getattr(nodes[-1], group))
        for node, owner in zip(reversed(nodes), [*reversed(groups), None], strict=True):
            value, name = replace(node, **{name: value}), owner
        config = value
    return config


def errors(world_size: int = 1, **values: Any) -> list[str]:
    with pytest.raises(ValueError) as caught:
        validate(configured(**values), world_size)
    return str(caught.value).split("\n  - ")[1:]


def test_defaults_are_valid_and_filled_in():
    config = validate(Config(), 1)
    p = config.parallel
    assert (p.dp_shard, p.attention_buckets, p.mlp_buckets, p.head_buckets) == (1, 1, 1, 1)
    assert config.scheduler.lr_decay_iters == config.trainer.train_iters == 100
    assert validate(config, 1) == config  # what is filled in stays valid, and stays


YARN = {"model__rotary_scaling__type": "yarn", "model__rotary_scaling__factor": 4.0}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "a/b"}, "name='a/b': one folder's name"),
        ({"name": ".."}, "name='..': one folder's name"),
        ({"name": ""}, "name='': one folder's name"),
        ({"output_dir": ""}, "output_dir is empty: give a path"),
        ({"data__path": ""}, "data.path is empty: give a path"),
        ({"logging__profile_step_end": 3}, "nothing is recorded without logging.profile_step_start"),
        (
            {"logging__profile_step_start": 4, "logging__profile_step_end": 3},
            "profile_step_end=3: must be from profile_step_start=4 to trainer.train_iters=100",
        ),
        (
            {"logging__profile_step_start": 100, "logging__profile_step_end": 101},
            "profile_step_end=101: must be from profile_step_start=100 to trainer.train_iters=100",
        ),
        (
            {
                "logging__profile_step_start": 1,
                "logging__profile_step_end": 1,
                "logging__profile_ranks": [],
            },
            "logging.profile_ranks=[]: name a rank",
        ),
        ({"logging__profile_ranks": [0, 1]}, "logging.profile_ranks: 1 is none of the ranks 0 to 0"),
        (
            {"trainer__on_bad_steps": "rollback", "trainer__max_rollbacks": 0},
            "trainer.max_rollbacks=0: trainer.on_bad_steps=rollback needs at least 1",
        ),
        (
            {"trainer__on_spike": "skip", "trainer__spike_deviations": 0.0},
            "trainer.on_spike=skip: nothing is a spike with spike_deviations=0",
        ),
        ({"launch__timeout_s": 900}, "trainer.hang_timeout_s=900: must be below launch.timeout_s=900"),
        ({"checkpoint__keep_every": 5}, "checkpoint.keep_every=5: all are kept with keep_last=0"),
        ({"model__num_layers": 0}, "model.num_layers=0: must be >= 1"),
        ({"optimizer__adam_eps": 0.0}, "optimizer.adam_eps=0.0: must be > 0"),
        ({"optimizer__adam_beta2": 1.0}, "optimizer.adam_beta2=1.0: must be in [0, 1)"),
        ({"optimizer__weight_decay": float("nan")}, "optimizer.weight_decay=nan: must be >= 0"),
        ({"optimizer__clip_grad": float("inf")}, "optimizer.clip_grad=inf: must be >= 0"),
        ({"data__valid_fraction": -0.1}, "data.valid_fraction=-0.1: must be in [0, 1)"),
        ({"data__valid_fraction": 1.0}, "data.valid_fraction=1.0: must be in [0, 1)"),
        (
            {"data__valid_fraction": 0.6, "data__test_fraction": 0.4},
            "valid_fraction=0.6 nothing is left",
        ),
        ({"data__long_documents": "drop"}, "data.long_documents=drop: data.packing=concat cuts one stream"),
        ({"data__path": ["a", "0.5"]}, "data.path=[a,0.5]: give sources alone, or weight and source in turn"),
        ({"data__valid_path": ["0", "a"]}, "every weight must be above 0"),
        ({"data__path": []}, "data.path is empty: give a path"),
        (
            {"data__path": ["0.5", "a.jsonl", "0.5", "b"]},
            "data.path=a.jsonl is text, not tokens: first run `megatsp preprocess --tokenizer byte "
            "--append-eod --input a.jsonl --output-prefix a`, then give a_text_document",
        ),
        ({"finetune__lora_rank": 2, "finetune__lora_targets": []}, "name each matrix with adapters once"),
        (
            {"finetune__lora_rank": 2, "finetune__lora_targets": ["q"]},
            "finetune.lora_targets: q; choose of q_proj",
        ),
        (
            {"finetune__lora_merge": True},
            "finetune.lora_merge: only adapters have it; set",
        ),
        ({"finetune__lora_alpha": 2.0}, "finetune.lora_alpha: only adapters have it"),
        ({"finetune__lora_rank": 2, "finetune__export_dtype": "bf16"}, "adapters alone are fp32"),
        ({"finetune__export": "none", "finetune__export_dtype": "bf16"}, "export=none: nothing is exported"),
        (
            {"finetune__early_stopping": 1, "data__valid_fraction": 0.0},
            "finetune.early_stopping=1: set finetune.early_stopping=0, or data.valid_fraction",
        ),
        ({"finetune__early_stopping": 1, "trainer__eval_interval": 0}, "or trainer.eval_interval"),
        ({"parallel__tsp_layout": "owners"}, "choose one of hidden, owner; did you mean owner?"),
        ({"trainer__dtype": "fp8"}, "trainer.dtype=fp8: choose one of fp32, bf16"),
        ({"parallel__pp": 2}, "parallel.pp=2: only 1 in this version; shard with parallel.tsp"),
        ({"parallel__dp_shard": 0}, "parallel.dp_shard=0: give a number of ranks, or -1"),
        ({"model__num_query_groups": 3}, "must divide num_attention_heads=4; use 1, 2, 4"),
        ({"model__kv_channels": 33}, "rotary embedding turns pairs; use 32 or 34"),
        ({"model__kv_channels": 1}, "rotary embedding turns pairs; use 2"),
        ({"model__rotary_scaling__factor": 0.5}, "model.rotary_scaling.factor=0.5: must be >= 1"),
        ({"model__rotary_scaling__factor": 2.0}, "needs rotary_scaling.type linear, llama3 or yarn"),
        ({"model__rotary_scaling__type": "yarn"}, "type=yarn needs a factor above 1; or type none"),
        (
            {**YARN, "model__rotary_scaling__beta_slow": 33.0},
            "model.rotary_scaling.beta_slow=33.0: must not exceed beta_fast=32.0",
        ),
        ({**YARN, "model__rotary_base": 1.0}, "model.rotary_base=1.0: rotary_scaling.type=yarn needs a base"),
        ({"model__rotary_scaling__beta_fast": 9.0}, "beta_fast=9.0: only rotary_scaling.type=yarn reads it"),
        ({"model__qk_layernorm_width": "all"}, "model.qk_layernorm_width=all: needs model.qk_layernorm=true"),
        ({"model__norm_position": "behind"}, "choose one of before, after"),
        (
            {"model__rotary_scaling__type": "llama3", "model__rotary_scaling__low_freq_factor": 4.0},
            "model.rotary_scaling.low_freq_factor=4.0: must be below high_freq_factor=4.0",
        ),
        ({"scheduler__min_lr": 1.0}, "scheduler.min_lr=1.0: must not exceed optimizer.lr=0.0003"),
        ({"scheduler__lr_warmup_iters": 100}, "must be below trainer.train_iters=100"),
        (
            {"scheduler__lr_warmup_iters": 50, "scheduler__lr_decay_iters": 50},
            "scheduler.lr_decay_iters=50: must be above scheduler.lr_warmup_iters=50, or 0",
        ),
        ({"scheduler__lr_decay_style": "WSD"}, "WSD needs the length of its final decay"),
        ({"scheduler__lr_wsd_decay_iters": 5}, "only lr_decay_style=WSD reads it; set 0"),
        (
            {
                "scheduler__lr_decay_style": "WSD",
                "scheduler__lr_wsd_decay_iters": 91,
                "scheduler__lr_warmup_iters": 10,
            },
            "scheduler.lr_wsd_decay_iters=91: at most 90 iterations follow the warm-up",
        ),
        ({"parallel__attention_buckets": 3}, "must divide model.num_query_groups=2; use one of 1, 2, or 0"),
        ({"parallel__mlp_buckets": 385}, "parallel.mlp_buckets=385: at most model.ffn_hidden_size=384"),
        ({"parallel__head_buckets": 258}, "parallel.head_buckets=258: at most model.vocab_size=257"),
        ({"trainer__global_batch_size": 10}, "1 data-parallel ranks must divide it; use 8 or 12"),
        ({"trainer__global_batch_size": 3}, "1 data-parallel ranks must divide it; use 4"),
    ],
)
def test_each_rule_alone(values, message):
    found = errors(**values)
    assert len(found) == 1 and message in found[0]


def test_tsp_must_divide_width_and_zigzag_chunks():
    found = errors(world_size=3, parallel__tsp=3, trainer__seq_length=1000)
    assert "model.hidden_size=128: parallel.tsp=3 must divide it; use 126 or 129" in found
    assert "trainer.seq_length=1000: 2 * parallel.tsp = 6 must divide it; use 996 or 1002" in found


@pytest.mark.parametrize(
    ("world_size", "values", "message"),
    [
        (4, {"tp": 2, "tsp": 2}, "parallel.tp=2 with tsp=2: both cut the weights; use one, and cp beside it"),
        (
            3,
            {"tp": 3},
            "model.num_attention_heads=4: parallel.tp=3 must divide it; use parallel.tp=1 or 2 or 4",
        ),
        (4, {"tp": 4}, "model.num_query_groups=2: parallel.tp=4 must divide it; use parallel.tp=1 or 2"),
        (
            4,
            {"cp": 4, "kv_exchange": "ulysses"},
            "cp x tsp = 4 ranks must divide the key/value heads (model.num",
        ),
        (
            2,
            {"tsp": 2, "kv_exchange": "ulysses", "attention_buckets": 2},
            "num_query_groups=2 / attention_buckets=2",
        ),
        (3, {"cp": 3}, "trainer.seq_length=256: 2 * parallel.cp = 6 must divide it; use 252 or 258"),
        (6, {"cp": 3, "tsp": 2}, "2 * parallel.cp * parallel.tsp = 12 must divide it; use 252 or 264"),
        (
            2,
            {"tp": 2, "attention_buckets": 2},
            "must divide model.num_query_groups=2 / tp=2; use one of 1, or 0",
        ),
        (2, {"tp": 2, "mlp_buckets": 193}, "at most model.ffn_hidden_size=384 / tp, 192 on the last rank"),
        (4, {"tp": -1, "cp": -1}, "parallel.cp=-1 and parallel.tp=-1: only one axis can take what is left"),
        (6, {"tp": 4, "cp": -1}, "parallel: tp 4 does not divide the 6 ranks; start 4 ranks"),
        (2, {"cp": 0}, "parallel.cp=0: give a number of ranks, or -1 for what the other axes leave"),
    ],
)
def test_rules_of_tensor_and_context_parallelism(world_size, values, message):
    found = errors(
        world_size, trainer__global_batch_size=96, **{f"parallel__{k}": v for k, v in values.items()}
    )
    assert any(message in error for error in found), found


def test_a_share_of_nothing_is_refused():
    found = errors(4, parallel__tp=4, model__num_query_groups=4, model__vocab_size=5)
    assert "model.vocab_size=5: parallel.tp=4 leaves a rank without any; use fewer" in found


@pytest.mark.parametrize(
    ("values", "sizes"),
    [
        ({"tp": -1}, (1, 1, 1, 1, 4)),
        ({"cp": -1, "tp": 2}, (1, 1, 2, 1, 2)),
        ({"tsp": -1, "dp_shard": 2}, (1, 2, 1, 2, 1)),
        ({"dp_replicate": -1}, (4, 1, 1, 1, 1)),
        ({"dp_replicate": 2}, (2, 2, 1, 1, 1)),
        ({"cp": 2, "tsp": -1, "fsdp_over_cp": True}, (1, 1, 2, 2, 1)),
    ],
)
def test_one_axis_takes_what_is_left(values, sizes):
    given = {
        "model__num_query_groups": 4,
        "trainer__global_batch_size": 16,
        **{f"parallel__{k}": v for k, v in values.items()},
    }
    p = validate(configured(**given), 4).parallel
    assert (p.dp_replicate, p.dp_shard, p.cp, p.tsp, p.tp) == sizes


def test_ulysses_chooses_buckets_of_whole_heads():
    p = validate(configured(parallel__tsp=2, parallel__kv_exchange="ulysses"), 2).parallel
    assert p.attention_buckets == 1  # of the two KV heads, each rank one


def test_sequence_needs_two_chunks_a_rank():
    found = errors(world_size=8, parallel__tsp=8, trainer__seq_length=8)
    assert found == ["trainer.seq_length=8: 2 * parallel.tsp = 16 must divide it; use 16"]


def test_all_violations_are_reported_together():
    found = errors(name="a/b", parallel__tp=2, trainer__dtype="fp8", model__kv_channels=3)
    assert len(found) == 4


def test_a_zero_count_is_reported_once():
    assert errors(parallel__tsp=0) == [
        "parallel.tsp=0: give a number of ranks, or -1 for what the other axes leave"
    ]
    assert errors(model__num_query_groups=0) == ["model.num_query_groups=0: must be >= 1"]
    assert errors(world_size=0, launch__nproc=0) == ["launch.nproc=0: must be >= 1"]


def test_a_world_that_no_mesh_fits_names_the_tsp_that_would():
    (error,) = errors(world_size=6, parallel__tsp=4, trainer__global_batch_size=12)
    assert "parallel: tsp 4 does not divide the 6 ranks" in error
    assert error.endswith(
        "start 4 ranks (alone: launch.nproc=4), or use parallel.tsp=1 or 2"
    )  # 3 and 6 do not divide h


def test_replicas_that_do_not_divide_the_world():
    (error,) = errors(world_size=4, parallel__dp_replicate=3, trainer__global_batch_size=12)
    assert error.endswith("dp_replicate 3 does not divide the 4 ranks; start 3 ranks (alone: launch.nproc=3)")


def test_a_given_dp_shard_must_make_the_world():
    (error,) = errors(world_size=6, parallel__tsp=2, parallel__dp_shard=4)
    assert "dp_shard 4 x tsp 2 = 8, but 6 ranks; start 8 ranks" in error


@pytest.mark.parametrize(
    ("world_size", "replicate", "tsp", "shard"), [(8, 1, 2, 4), (8, 2, 2, 2), (8, 1, 8, 1), (6, 3, 1, 2)]
)
def test_dp_shard_is_what_the_other_axes_leave(world_size, replicate, tsp, shard):
    config = configured(parallel__tsp=tsp, parallel__dp_replicate=replicate, trainer__global_batch_size=96)
    filled = validate(config, world_size)
    assert filled.parallel.dp_shard == shard and dp_size(filled) == replicate * shard


def automatic(world_size: int, **values: Any) -> tuple[int, int, int]:
    """With so many tokens that no bucket has too little to compute, unless `values` say other."""
    many = {"trainer__seq_length": 2**24, "parallel__tsp": world_size}
    p = validate(configured(**{**many, **values}), world_size).parallel
    return p.attention_buckets, p.mlp_buckets, p.head_buckets


def test_automatic_buckets():
    assert automatic(4) == (2, 4, 4)  # attention: no more than the two KV heads
    assert automatic(8, model__num_query_groups=4) == (4, 8, 8)
    assert automatic(1, parallel__tsp_layout="owner") == (1, 1, 1)  # nothing is streamed
    assert automatic(4, parallel__tsp_layout="owner")[1] == 4
    assert automatic(8, model__num_query_groups=1)[0] == 1
    assert automatic(1) == (1, 1, 1)
    assert automatic(1, model__vocab_size=32000)[2] == 4  # of at most 8192 rows
    assert automatic(1, model__ffn_hidden_size=1, model__vocab_size=1)[1:] == (1, 1)


WIDE = {"model__qk_layernorm": True, "model__qk_layernorm_width": "all"}


@pytest.mark.parametrize("layout", ["hidden", "owner"])
def test_a_norm_over_all_heads_has_them_in_one_bucket(layout):
    assert automatic(4, parallel__tsp_layout=layout, **WIDE) == (1, 4, 4)
    assert automatic(4, parallel__attention_buckets=2, **WIDE)[0] == 2  # given, two are walked twice


def test_a_norm_over_all_heads_is_not_cut_by_tp():
    assert errors(world_size=2, parallel__tp=2, **WIDE) == [
        "parallel.tp=2: model.qk_layernorm_width=all normalises over heads that tp puts on different ranks; "
        "use tsp or cp"
    ]
    validate(configured(parallel__tp=2, **{**WIDE, "model__qk_layernorm_width": "head"}), 2)


def test_automatic_buckets_have_enough_to_compute():
    """Multiply-adds of the MLP: 4 samples x T/2 tokens x 3 x 384 x 128; 2^30 of them are worth a bucket."""
    length = 2**31 // (4 // 2 * 3 * 384 * 128)  # the most tokens that are not worth two
    assert automatic(2, trainer__seq_length=length // 4 * 4)[1] == 1
    assert automatic(2, trainer__seq_length=length // 4 * 4 + 4)[1] == 2
    assert automatic(2, trainer__seq_length=256) == (1, 1, 1)
    assert automatic(2, trainer__seq_length=256, model__vocab_size=32000)[2] == 4  # of at most 8192 rows


def test_given_buckets_are_kept():
    given = {"attention_buckets": 1, "mlp_buckets": 5, "head_buckets": 257}
    filled = validate(configured(**{f"parallel__{name}": n for name, n in given.items()}), 1)
    assert {name: getattr(filled.parallel, name) for name in given} == given


def test_fused_transfers_need_the_hidden_layout():
    keys = dict(parallel__overlap="fused", parallel__tsp_layout="owner")
    assert errors(world_size=2, parallel__tsp=2, **keys) == [
        "parallel.overlap=fused: tsp_layout=owner cannot; use hidden, or overlap=auto"
    ]
    validate(configured(parallel__tsp=2, parallel__overlap="fused"), 2)
    validate(configured(parallel__tsp=1, **keys), 1)  # nothing travels


def test_owner_needs_a_bucket_an_owner():
    found = errors(world_size=4, parallel__tsp=4, parallel__tsp_layout="owner", parallel__mlp_buckets=6)
    assert found == ["parallel.mlp_buckets=6: owner needs a multiple of tsp; use 4 or 8, or 0"]
    (error,) = errors(world_size=4, parallel__tsp=4, parallel__tsp_layout="owner", model__ffn_hidden_size=3)
    assert error == "parallel.mlp_buckets=4: at most model.ffn_hidden_size=3"


def test_wsd_may_follow_the_warm_up_at_once():
    config = configured(
        scheduler__lr_decay_style="WSD", scheduler__lr_wsd_decay_iters=90, scheduler__lr_warmup_iters=10
    )
    assert validate(config, 1).scheduler.lr_decay_iters == 100
