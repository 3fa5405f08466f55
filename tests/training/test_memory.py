"""Predicted bytes of a rank, counted by hand for sizes that nothing divides."""

import sys
from dataclasses import replace

import pytest
import torch

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
    assert held.buckets == 2 * 4 * 24 * 6  # attention: 8 + 4 + 4 + 8 rows of h
    parts = (held.weights, held.gradients, held.optimizer, held.saved_activations, held.buckets)
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
    assert held.buckets == 2 * 4 * largest_bucket * 6


def test_fsdp_shards_are_rounded_up():
    held = predicted(2, dp_shard=2)
    check_parameters(held, 2 * (2 * 24 + 2 * 12 + 3 * 21 + 6 + 8) + 3 + 33)
    held = predicted(6, tsp=3, dp_shard=2)
    # 7 x 2 halves to 7, a gain of 2 to 1, 11 x 2 to 11
    check_parameters(held, 2 * (2 * 8 + 2 * 4 + 3 * 7 + 2 + 8) + 1 + 11)


def test_recompute_and_dtype():
    assert predicted(recompute="full").saved_activations == 2 * 36 * 4 * 6
    assert predicted(recompute="selective").saved_activations == 2 * 36 * 4 * (6 + 6 + 8 + 4)
    held = predicted(dtype="bf16", recompute="selective")
    assert held.saved_activations == 2 * 36 * (2 * (6 + 6 + 8) + 4 * 4)  # the log-sum-exp stays fp32
    assert held.buckets == predicted().buckets // 2
    assert held.weights == predicted().weights


def test_more_buckets_are_smaller():
    held = predicted(attention_buckets=2, mlp_buckets=4, head_buckets=3)
    assert held.buckets == 2 * 4 * 12 * 6  # attention 12 rows; MLP 2 x 3 columns; head 4 rows


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_is_this_process_resident_set():
    with open("/proc/self/status") as file:
        kib = next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
    assert peak_memory_gib(torch.device("cpu")) == pytest.approx(kib / 2**20, rel=0.1)
