"""The transfers that are measured are those that a step posts, in kind and in size."""

from dataclasses import replace

import pytest
import torch
from distributed import run_distributed
from torch.utils._python_dispatch import TorchDispatchMode

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
    ("parallel.tsp=4", "parallel.tsp_layout=owner", "parallel.attention_buckets=2"),
    ("parallel.tsp=2", "parallel.cp=2", "parallel.kv_exchange=hierarchical"),
    ("parallel.tsp=2", "parallel.cp=2", "parallel.kv_exchange=ulysses"),
    ("parallel.tp=2", "parallel.cp=2", "parallel.kv_exchange=hierarchical"),
    ("parallel.tsp=2", "parallel.dp_shard=2", "trainer.dtype=bf16"),
]  # fmt: skip


FSDP_WAYS = [
    ("parallel.dp_shard=4",),
    ("parallel.dp_shard=2", "parallel.dp_replicate=2", "trainer.dtype=bf16"),
    ("parallel.dp_shard=4", "model.vocab_size=602"),  # an embedding that is wider than a layer, and uneven
    ("parallel.dp_shard=4", "model.vocab_size=602", "model.untie_embeddings_and_output_weights=false"),
    ("parallel.dp_shard=2", "parallel.cp=2", "parallel.fsdp_over_cp=true", "model.ffn_hidden_size=97"),
    ("parallel.dp_shard=2", "parallel.tsp=2", "model.ffn_hidden_size=97", "model.vocab_size=603"),
    ("parallel.dp_shard=2", "parallel.tsp=2", "parallel.tsp_layout=owner"),
    ("parallel.dp_shard=2", "parallel.tp=2", "model.qk_layernorm=true"),
    ("parallel.dp_shard=4", "lora=3", "trainer.dtype=bf16"),
    ("parallel.dp_replicate=4",),
]  # fmt: skip


def config_of(*overrides: str):
    """With a pseudo-override lora=RANK, which `megatsp sft` alone takes."""
    ours = [text for text in overrides if not text.startswith("lora=")]
    config = validate(compose([*SMALL, *ours]), 4)
    lora_rank = sum(int(text.removeprefix("lora=")) for text in overrides if text not in ours)
    return replace(config, finetune=replace(config.finetune, lora_rank=lora_rank))


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
        step(config_of(*overrides))
        found.append(seen)
    return found


def step(config) -> None:
    axes = Axes.build(config.parallel, torch.device("cpu"))
    gpt = build_model(config, axes)
    local = axes.take_local(torch.arange(3 * 48).view(3, 48) % 64)
    gpt(local, local, torch.ones(local.shape)).sum().backward()


class Collectives(TorchDispatchMode):
    """Notes (operation, bytes of the whole, ranks) of all collectives; 0 ranks of what does not tell."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[str, int, int]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        def num_bytes(tensor):
            return tensor.numel() * tensor.element_size()

        if func.namespace == "c10d":
            name = func.name().removeprefix("c10d::")
            if name in ("_allgather_base_", "_reduce_scatter_base_"):
                small, large = sorted(map(num_bytes, args[:2]))
                operation = "all_gather" if name.startswith("_all") else "reduce_scatter"
                self.seen.add((operation, large, large // small))
            elif name == "allreduce_":
                self.seen.add(("all_reduce", num_bytes(args[0][0]), 0))
        return func(*args, **(kwargs or {}))


def fsdp_in_a_step(ways) -> list[set[tuple[str, int, int]]]:
    """On a rank: the collectives of a step of each way, FSDP's among them."""
    found = []
    for overrides in ways:
        with Collectives() as collectives:
            step(config_of(*overrides))
        found.append(collectives.seen)
    return found


def test_what_fsdp_posts_in_a_step():
    for overrides, seen in zip(FSDP_WAYS, run_distributed(fsdp_in_a_step, 4, FSDP_WAYS)[0], strict=True):
        config = config_of(*overrides)
        found = [transfer for transfer in transfers(config) if transfer.axes[0].startswith("dp")]
        assert found
        for transfer in found:
            size = len(groups(transfer.axes, config.parallel)[0])
            ranks = 0 if transfer.operation == "all_reduce" else size
            alike = {b for operation, b, size in seen if (operation, size) == (transfer.operation, ranks)}
            assert transfer.bytes in alike, (overrides, transfer, seen)
            if max(config.parallel.tsp, config.parallel.tp) == 1:  # then all of them are FSDP's
                assert transfer.bytes == max(alike), (overrides, transfer)


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
    layer = 48 * (2 * 8 * 6 + 2 * 4 * 6) + 3 * 48 * 96 + 2 * 48
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
