"""Predicted bytes of a rank, counted by hand for sizes that nothing divides."""

import sys
from dataclasses import replace
from itertools import product

import pytest
import torch
from distributed import run_distributed
from megatsp_kernels.peers import Layout
from parity import OLMO2

from megatsp.axes import Axes
from megatsp.bench.live_bytes import LiveBytes
from megatsp.model.parallelize import build_model
from megatsp.schema import Config, ModelConfig, ParallelConfig, TrainerConfig
from megatsp.training.memory import RankBytes, peak_memory_gib, predict
from megatsp.validate import validate

CONFIG = Config(
    model=ModelConfig(
        num_layers=2, hidden_size=6, ffn_hidden_size=7, num_attention_heads=4, num_query_groups=2,
        kv_channels=2, vocab_size=11, add_qkv_bias=True,
    ),
    parallel=ParallelConfig(attention_buckets=1, mlp_buckets=1, head_buckets=1),
    trainer=TrainerConfig(seq_length=12, micro_batch_size=3, global_batch_size=6),
)  # fmt: skip


def predicted(world_size: int = 1, dtype: str = "fp32", recompute: str = "none", **parallel) -> RankBytes:
    trainer = replace(CONFIG.trainer, dtype=dtype, recompute_granularity=recompute)
    config = replace(CONFIG, trainer=trainer, parallel=replace(CONFIG.parallel, **parallel))
    return predict(validate(config, world_size))


def check_parameters(held: RankBytes, elements: int) -> None:
    assert (held.weights, held.gradients, held.optimizer) == (4 * elements, 4 * elements, 8 * elements)


def test_one_rank():
    held = predicted()
    # A layer: q, o 8 x 6; k, v 4 x 6; gate, up, down 7 x 6; two gains of 6; biases 8, 4, 4.
    check_parameters(held, 2 * (2 * 48 + 2 * 24 + 3 * 42 + 12 + 16) + 6 + 66)
    # 36 tokens keep x, the MLP's input and attention's output, 4 log-sum-exps; q, k, v, gate, up.
    assert held.saved_activations == 2 * 36 * 4 * ((6 + 6 + 8) + 4 + (8 + 4 + 4) + (7 + 7))
    assert held.gathered == 0  # nothing streams
    parts = (held.weights, held.gradients, held.optimizer, held.saved_activations, held.gathered)
    assert held.total == sum(parts)


@pytest.mark.parametrize(
    ("layout", "mlp_buckets", "largest_bucket"),
    [("hidden", 1, 24), ("owner", 3, 24)],
)
def test_tsp_shards(layout, mlp_buckets, largest_bucket):
    held = predicted(3, tsp=3, tsp_layout=layout, mlp_buckets=mlp_buckets)
    if layout == "hidden":  # h 6 is cut to 2, of every matrix and gain; biases are whole
        elements = 2 * (2 * 8 * 2 + 2 * 4 * 2 + 3 * 7 * 2 + 2 * 2 + 16) + 2 + 11 * 2
    else:  # rank 0 holds most: 3 of 8 rows of q and columns of o, 2 of 4 of k and v, 3 of 7 of the MLP
        elements = 2 * (2 * 3 * 6 + 2 * 2 * 6 + 3 * 3 * 6 + 2 * 2 + 16) + 2 + 11 * 2
    check_parameters(held, elements)
    assert held.saved_activations == predicted().saved_activations // 3
    assert held.gathered == 2 * 4 * largest_bucket * 6


def test_fsdp_shards_are_rounded_up():
    held = predicted(2, dp_shard=2)
    check_parameters(held, 2 * (2 * 24 + 2 * 12 + 3 * 21 + 6 + 8) + 3 + 33)
    held = predicted(6, tsp=3, dp_shard=2)
    # 7 x 2 halves to 7, a gain of 2 to 1, 11 x 2 to 11
    check_parameters(held, 2 * (2 * 8 + 2 * 4 + 3 * 7 + 2 + 8) + 1 + 11)


def test_tensor_parallelism_cuts_the_other_dim():
    held = predicted(2, tp=2)
    # Rank 0: 4 of 8 rows of q and columns of o, 2 of 4 of k and v, 4 of 7 of the MLP; biases with them;
    # gains are whole; 6 of 11 rows of the embedding.
    check_parameters(held, 2 * (2 * 4 * 6 + 2 * 2 * 6 + 3 * 4 * 6 + 12 + (4 + 2 + 2)) + 6 + 6 * 6)
    # x and the MLP's input of 18 tokens; of all 36 the half of attention and 4 of 7 columns of gate and up.
    assert held.saved_activations == 2 * 4 * (18 * (6 + 6) + 36 * (4 + 2 + (4 + 2 + 2) + (4 + 4)))
    assert held.gathered == 0


def test_context_parallelism_cuts_the_tokens_alone():
    held, alone = predicted(3, cp=3), predicted()
    assert held == replace(alone, saved_activations=alone.saved_activations // 3)
    assert predicted(3, cp=3, kv_exchange="ring") == held


def test_fsdp_over_cp_cuts_both():
    assert predicted(2, cp=2, fsdp_over_cp=True) == replace(
        predicted(2, dp_shard=2), saved_activations=predicted(2, cp=2).saved_activations
    )


def test_tensor_parallelism_within_fsdp_over_cp():
    held = predicted(4, tp=2, cp=2, fsdp_over_cp=True)
    check_parameters(held, 2 * (2 * 2 * 6 + 2 * 6 + 3 * 2 * 6 + 6 + (2 + 1 + 1)) + 3 + 3 * 6)
    assert held.saved_activations == predicted(2, tp=2).saved_activations // 2
    replicated = predicted(4, tp=2, cp=2)
    assert replicated == replace(predicted(2, tp=2), saved_activations=held.saved_activations)


def test_replicas_change_nothing():
    trainer = replace(CONFIG.trainer, micro_batch_size=1, global_batch_size=6)
    config = replace(CONFIG, trainer=trainer, parallel=replace(CONFIG.parallel, dp_replicate=2))
    assert predict(validate(config, 2)) == predict(validate(replace(CONFIG, trainer=trainer), 1))


def rank_elements(config: Config) -> int:
    """On a rank: elements of its shards."""
    gpt = build_model(config, Axes.build(config.parallel, torch.device("cpu")))
    return sum(p.to_local().numel() for p in gpt.parameters())


@pytest.mark.parametrize(
    "parallel",
    [
        dict(tp=2),
        dict(cp=2),
        dict(cp=2, fsdp_over_cp=True),
        dict(tsp=2),
        dict(tsp=2, tsp_layout="owner", mlp_buckets=2),
    ],
)
def test_the_first_rank_holds_the_predicted_weights(parallel):
    """Rank 0 has the largest shard of everything; with sizes that FSDP's ranks divide."""
    model = replace(CONFIG.model, ffn_hidden_size=7 if "fsdp_over_cp" not in parallel else 8, vocab_size=12)
    config = validate(replace(CONFIG, model=model, parallel=replace(CONFIG.parallel, **parallel)), 2)
    assert 4 * run_distributed(rank_elements, 2, config)[0] == predict(config).weights


def test_recompute_and_dtype():
    assert predicted(recompute="full").saved_activations == 2 * 36 * 4 * 6
    assert predicted(recompute="selective").saved_activations == 2 * 36 * 4 * (6 + 6 + 8 + 4)
    held = predicted(dtype="bf16", recompute="selective")
    assert held.saved_activations == 2 * 36 * (2 * (6 + 6 + 8) + 4 * 4)  # the log-sum-exp stays fp32
    assert predicted(2, "bf16", tsp=2).gathered == predicted(2, tsp=2).gathered // 2
    assert held.weights == predicted().weights


@pytest.mark.parametrize(("recompute", "inverses"), [("none", 2), ("selective", 2), ("full", 0)])
def test_norms_after_and_over_all_heads(recompute, inverses):
    """Each of 36 tokens has one more vector of h; 1 / rms of q and of k if there are several buckets."""
    model = dict(norm_position="after", qk_layernorm=True, qk_layernorm_width="all", add_qkv_bias=False)
    trainer = replace(CONFIG.trainer, recompute_granularity=recompute)
    for buckets, kept in ((1, 0), (2, inverses)):
        parallel = replace(CONFIG.parallel, attention_buckets=buckets)
        config = replace(CONFIG, model=replace(CONFIG.model, **model), parallel=parallel, trainer=trainer)
        held, before = predict(validate(config, 1)), predicted(recompute=recompute)
        assert held.saved_activations == before.saved_activations + 2 * 36 * 4 * (6 + kept)
        check_parameters(held, 2 * (2 * 48 + 2 * 24 + 3 * 42 + 12 + 8 + 4) + 6 + 66)


OTHERS: tuple[dict, ...] = ({}, dict(norm_position="after"), OLMO2)


def rank_kept(configs: list[Config]) -> list[int]:
    """On a rank: bytes alive after each one's forward that were not before it."""
    found = []
    for config in configs:
        axes = Axes.build(config.parallel, torch.device("cpu"))
        gpt = build_model(config, axes)
        with LiveBytes() as live:
            live.hold_model(gpt)
            ids = torch.zeros(config.trainer.micro_batch_size, config.trainer.seq_length, dtype=torch.int64)
            out = gpt(ids)
            found.append(live.live["activations"])
            del out
    return found


def test_a_layer_keeps_what_is_predicted():
    """Of two models that differ by a layer; beside what is predicted it keeps its two gains of 6."""
    pairs = []
    for model, recompute, buckets in product(OTHERS, ("none", "selective", "full"), (1, 2)):
        trainer = replace(CONFIG.trainer, recompute_granularity=recompute)
        parallel = replace(CONFIG.parallel, attention_buckets=buckets)
        for layers in (1, 2):
            changed = replace(CONFIG.model, num_layers=layers, **model)
            config = replace(CONFIG, model=changed, trainer=trainer, parallel=parallel)
            pairs.append(validate(config, 1))
    (kept,) = run_distributed(rank_kept, 1, pairs)
    expected = [predict(config).saved_activations for config in pairs]
    for one, two, least, most in zip(kept[::2], kept[1::2], expected[::2], expected[1::2], strict=True):
        assert two - one == most - least + 2 * 6 * 4


def test_more_buckets_are_smaller():
    assert predicted(2, tsp=2).gathered == 2 * 4 * 24 * 6  # attention: 8 + 4 + 4 + 8 rows of h
    held = predicted(2, tsp=2, attention_buckets=2, mlp_buckets=4, head_buckets=3)
    assert held.gathered == 2 * 4 * 12 * 6  # attention 12 rows; MLP 2 x 3 columns; head 4 rows


def test_what_ranks_share_is_predicted():
    held = predicted(2, tsp=2, overlap="fused").gathered - predicted(2, tsp=2, overlap="collective").gathered
    rows, columns = 3, 24
    layout = Layout(2, 1, slice_bytes=rows * columns * 4, gradient_bytes=rows * columns * 4)
    slack = 7 * 256 + layout.flags_bytes  # flags, and six slices that end before the next one begins
    assert layout.num_bytes - slack <= held <= layout.num_bytes


def test_fsdp_gathers_two_layers():
    layer = 24 + 3 * 7  # columns of h
    assert predicted(2, dp_shard=2).gathered == 2 * 4 * layer * 6
    assert predicted(4, tp=2, dp_shard=2).gathered == 2 * 4 * (12 + 3 * 4) * 6
    assert (
        predicted(2, cp=2).gathered == 0
        and predicted(2, cp=2, fsdp_over_cp=True).gathered == 2 * 4 * layer * 6
    )


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_is_this_process_resident_set():
    with open("/proc/self/status") as file:
        kib = next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
    assert peak_memory_gib(torch.device("cpu")) == pytest.approx(kib / 2**20, rel=0.1)
