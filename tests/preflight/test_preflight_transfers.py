"""The transfers that are measured are those that a step posts, in kind and in size."""

import pytest
import torch
from distributed import run_distributed

from megatsp.axes import Axes
from megatsp.comm import Comm
from megatsp.compose import compose
from megatsp.model.parallelize import build_model
from megatsp.preflight.measure import ring_rounds
from megatsp.preflight.transfers import bus_bytes, groups, transfers
from megatsp.schema import ParallelConfig
from megatsp.validate import validate

SMALL = (
    "model.num_layers=2", "model.hidden_size=48", "model.ffn_hidden_size=96", "model.vocab_size=64",
    "model.num_attention_heads=8", "model.num_query_groups=4", "model.kv_channels=6", "trainer.seq_length=48",
    "trainer.micro_batch_size=3", "trainer.global_batch_size=12", "launch.device=cpu", "launch.nproc=4",
    "trainer.recompute_granularity=full", "data.tokenizer=byte",
    "model.untie_embeddings_and_output_weights=true",
)  # fmt: skip
WAYS = [
    ("parallel.tsp=4", "parallel.attention_buckets=2", "parallel.mlp_buckets=3"),
    ("parallel.tsp=4", "parallel.attention_buckets=4", "parallel.mlp_buckets=4", "parallel.head_buckets=4",
     "parallel.kv_exchange=ring"),
    ("parallel.tsp=4", "parallel.tsp_layout=owner", "parallel.attention_buckets=4"),
    ("parallel.tsp=2", "parallel.cp=2", "parallel.kv_exchange=hierarchical"),
    ("parallel.tsp=2", "parallel.cp=2", "parallel.kv_exchange=ulysses"),
    ("parallel.tp=2", "parallel.cp=2", "parallel.kv_exchange=hierarchical"),
    ("parallel.tsp=2", "parallel.dp_shard=2", "trainer.dtype=bf16"),
]  # fmt: skip


def config_of(*overrides: str):
    return validate(compose([*SMALL, *overrides]), 4)


def posted_in_a_step(ways) -> list[set[tuple[str, int, int]]]:
    """On a rank: (operation, bytes of its buffer, ranks) of what Comms post in a step of each way."""
    found = []
    post = Comm._post
    for overrides in ways:
        seen: set[tuple[str, int, int]] = set()

        def record(comm, operation, label, buffer, *works, seen=seen):
            seen.add((operation, buffer.numel() * buffer.element_size(), comm.size))
            post(comm, operation, label, buffer, *works)

        Comm._post = record
        config = config_of(*overrides)
        axes = Axes.build(config.parallel, torch.device("cpu"))
        gpt = build_model(config, axes)
        local = axes.take_local(torch.arange(3 * 48).view(3, 48) % 64)
        gpt(local, local, torch.ones(local.shape)).sum().backward()
        found.append(seen)
    return found


def test_what_a_step_posts():
    for overrides, seen in zip(WAYS, run_distributed(posted_in_a_step, 4, WAYS)[0], strict=True):
        config = config_of(*overrides)
        checked = 0
        for transfer in transfers(config):
            if transfer.axes[0].startswith("dp"):
                continue  # FSDP2's
            size = len(groups(transfer.axes, config.parallel)[0])
            own = transfer.bytes // size if transfer.operation == "all_gather" else transfer.bytes
            assert (transfer.operation, own, size) in seen, (overrides, transfer)
            checked += 1
        assert checked >= 2


def test_no_weights_travel_that_are_wider_than_the_widest_bucket():
    config = config_of(*WAYS[0])
    gathers = {t.bytes // 4 for t in transfers(config) if t.operation == "all_gather" and "weights" in t.what}
    (seen, *_) = run_distributed(posted_in_a_step, 4, WAYS[:1])[0]
    scatters = max(b for operation, b, _ in seen if operation == "reduce_scatter")
    assert gathers == {max(b for operation, b, _ in seen if operation == "all_gather")}
    assert scatters == max(t.bytes for t in transfers(config) if t.operation == "reduce_scatter")


def test_data_parallel_transfers():
    config = config_of("parallel.dp_shard=2", "parallel.dp_replicate=2", "trainer.dtype=bf16")
    layer = 48 * (2 * 8 * 6 + 2 * 4 * 6) + 3 * 48 * 96
    assert [(t.what, t.axes, t.operation, t.elements, t.dtype) for t in transfers(config)] == [
        ("layer's weights", ("dp_shard",), "all_gather", layer, "bf16"),
        ("layer's gradients", ("dp_shard",), "reduce_scatter", layer, "fp32"),
        ("layer's gradients", ("dp_replicate", "cp"), "all_reduce", layer // 2, "fp32"),
    ]
    assert transfers(validate(compose([*SMALL, "launch.nproc=1"]), 1)) == []


def test_groups_are_those_of_the_mesh():
    parallel = ParallelConfig(dp_replicate=2, dp_shard=2, cp=2, tsp=2, tp=1)
    assert groups(("tsp",), parallel)[:2] == [[0, 1], [2, 3]]
    assert groups(("cp", "tsp"), parallel) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert groups(("dp_replicate", "cp"), parallel)[0] == [0, 2, 8, 10]


@pytest.mark.parametrize(
    ("operation", "moved"),
    [("all_gather", 750), ("reduce_scatter", 750), ("all_to_all", 750), ("all_reduce", 1500), ("shift", 1000),
     ("broadcast", 1000), ("reduce", 1000)],
)  # fmt: skip
def test_bus_bytes(operation, moved):
    assert bus_bytes(operation, 1000, 4) == moved


@pytest.mark.parametrize("count", range(2, 9))
def test_a_ring_of_nodes_in_rounds(count):
    rounds = ring_rounds(count)
    for pairs in rounds:
        ends = [node for pair in pairs for node in pair]
        assert len(ends) == len(set(ends))
    every = sorted(tuple(sorted(pair)) for pairs in rounds for pair in pairs)
    wanted = {tuple(sorted((i, (i + 1) % count))) for i in range(count)}
    assert every == sorted(wanted)
    assert ring_rounds(1) == []
