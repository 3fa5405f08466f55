"""A step's memory: simulated in one process it is what real ranks measure, and no other rank is needed.

They differ by when gloo's threads let go of a tensor, and by what no rule tells of operators' insides.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.distributed as dist
from distributed import run_distributed

from megatsp.bench.memory import (
    StepMemory,
    fake_group,
    measured_memory,
    one_rank_memory,
    simulated_memory,
    simulated_peak,
)
from megatsp.bench.step import TrainStep
from megatsp.compose import compose
from megatsp.schema import Config
from megatsp.validate import validate

CPU = torch.device("cpu")
KINDS = ("weights", "gradients", "optimizer", "activations", "communication")

SMALL = [
    *("model.num_layers=2", "model.hidden_size=128", "model.ffn_hidden_size=256", "model.vocab_size=515"),
    *("model.num_attention_heads=4", "model.num_query_groups=4", "model.kv_channels=32"),
    *("trainer.seq_length=1024", "trainer.micro_batch_size=1", "trainer.global_batch_size=1"),
]

FULL = "trainer.dtype=bf16 trainer.recompute_granularity=full"
TWO = "trainer.global_batch_size=2"

# Ranks, and what else is said of the run. A new scheme is one line.
CASES = [
    (1, f"parallel.tsp=1 {FULL}"),
    (2, "parallel.tsp=2"),
    (2, "parallel.tsp=2 parallel.tsp_layout=owner trainer.recompute_granularity=full"),
    (2, f"parallel.dp_shard=2 {TWO} {FULL}"),
    (2, "parallel=cp_ring trainer.dtype=bf16"),
    (2, "parallel=cp_ulysses trainer.recompute_granularity=full"),
    (2, "parallel=fsdp_cp trainer.dtype=bf16 trainer.recompute_granularity=selective"),
    (2, "parallel=tp"),
    (4, f"parallel.tsp=2 parallel.dp_shard=2 {TWO} {FULL}"),
]
MORE_CASES = [
    (1, "parallel.tsp=1"),
    (2, "parallel.tsp=2 trainer.dtype=bf16 trainer.recompute_granularity=selective"),
    (2, f"parallel.dp_shard=2 {TWO}"),
    (2, f"parallel.dp_replicate=2 {TWO}"),
    (2, "parallel=cp"),
    (2, f"parallel=tp {FULL}"),
    (4, "parallel.tsp=4 trainer.recompute_granularity=full"),
    (4, "parallel.tsp=4 trainer.dtype=bf16 parallel.tsp_layout=owner"),
    (4, "parallel.tsp=4 parallel.kv_exchange=ring trainer.recompute_granularity=selective"),
    (4, f"parallel.tsp=2 parallel.dp_replicate=2 model.num_query_groups=2 {TWO}"),
    (4, "parallel=tp_cp trainer.recompute_granularity=full"),
    (4, "parallel=cp_tsp trainer.dtype=bf16"),
]
ALL_CASES = [*CASES, *(pytest.param(*more, marks=pytest.mark.slow) for more in MORE_CASES)]


def config(world_size: int, changes: str) -> Config:
    return validate(compose([*SMALL, *changes.split()]), world_size)


def rank_measured(configs: list[Config]) -> list[StepMemory]:
    """The lowest of three measurements: on a busy machine gloo's threads let go of tensors late."""
    torch.set_num_threads(1)
    thrice = [[measured_memory(config, CPU) for _ in range(3)] for config in configs]
    return [min(found, key=lambda memory: memory.allocated or 0) for found in thrice]


@cache
def measured(world_size: int, among: tuple[tuple[int, str], ...]) -> dict[str, list[StepMemory]]:
    """Of each of these cases of so many ranks, what every rank measured."""
    cases = [changes for size, changes in among if size == world_size]
    by_rank = run_distributed(rank_measured, world_size, [config(world_size, c) for c in cases])
    return dict(zip(cases, map(list, zip(*by_rank, strict=True)), strict=True))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As on the ranks that are measured: flash attention has a block of scores for each thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def simulated(world_size: int, changes: str, rank: int) -> StepMemory:
    return simulated_memory(config(world_size, changes), world_size, rank)


@pytest.mark.parametrize(("world_size", "changes"), ALL_CASES)
def test_simulated_is_measured(world_size, changes):
    among = CASES if (world_size, changes) in CASES else MORE_CASES
    ranks = measured(world_size, tuple(among))[changes]
    for rank in {0, world_size - 1}:
        found, real = simulated(world_size, changes, rank), ranks[rank]
        assert found.peak == sum(getattr(found, kind) for kind in KINDS)
        assert (found.weights, found.optimizer, found.moved) == (real.weights, real.optimizer, real.moved)
        assert found.peak == pytest.approx(real.peak, rel=0.05)
        assert found.allocated == pytest.approx(real.allocated, rel=0.05)
    # No rank holds more than the two that are simulated.
    largest = max(simulated(world_size, changes, rank).peak for rank in (0, world_size - 1))
    assert largest == pytest.approx(max(rank.peak for rank in ranks), rel=0.05)


@pytest.mark.parametrize(("world_size", "changes"), ALL_CASES)
def test_one_rank_alone_holds_what_simulation_says(world_size, changes):
    """Exactly: no gloo. Its losses mean nothing, and nothing in the step minds."""
    rank = world_size - 1
    alone = one_rank_memory(config(world_size, changes), world_size, rank, CPU)
    found = simulated(world_size, changes, rank)
    assert replace(alone, allocated=None) == replace(found, allocated=None)
    assert found.allocated == pytest.approx(alone.allocated, rel=0.05)
    assert not dist.is_initialized()


def rank_traffic(chosen: Config) -> tuple[int, dict[str, int]]:
    """On a rank: what Comm counted in a step, and what was dispatched."""
    found = measured_memory(chosen, CPU)
    step = TrainStep(chosen, CPU)
    step.run()
    return step.axes.traffic.bytes.total(), found.moved


@pytest.mark.parametrize("layout", ["hidden", "owner"])
def test_moved_bytes_are_all_that_tsp_moves(layout):
    """A scalar's all-reduce, of the loss or the gradient norm, counts as nothing by (D-1)/D."""
    chosen = config(2, f"parallel.tsp=2 parallel.tsp_layout={layout}")
    for counted, moved in run_distributed(rank_traffic, 2, chosen):
        assert counted == sum(moved.values()) > 0


def test_moved_bytes_of_fsdp_by_hand():
    """Gathered in bf16 twice a micro-batch (the root once), reduce-scattered in fp32 once."""
    chosen = config(
        2, "parallel.dp_shard=2 trainer.dtype=bf16 trainer.global_batch_size=4 model.vocab_size=516"
    )
    with fake_group(2, 0):
        step = TrainStep(chosen, CPU)
        layers = sum(p.numel() for p in step.gpt.model.layers.parameters())
        root = sum(p.numel() for p in step.gpt.parameters()) - layers
    moved = simulated_memory(chosen, 2, 0).moved
    micro_batches = 2
    assert moved["all_gather"] == micro_batches * 2 * (2 * layers + root) // 2
    assert moved["reduce_scatter"] == micro_batches * 4 * (layers + root) // 2
    assert moved["all_reduce"] == 0


def test_a_group_of_thousands_is_simulated_in_this_process():
    """Weights of one rank of 1,024 are those of one of 8: tsp shards them, replicas do not."""
    found = simulated_memory(
        config(1024, "parallel.tsp=8 parallel.dp_replicate=128 trainer.global_batch_size=128"), 1024, 1023
    )
    alone = simulated_memory(config(8, "parallel.tsp=8"), 8, 7)
    assert found.weights == alone.weights and found.optimizer == alone.optimizer
    assert found.moved["all_reduce"] > alone.moved["all_reduce"]  # of the replicas' gradients
    assert not dist.is_initialized()


def test_the_larger_of_the_first_and_the_last_rank_is_taken():
    """They differ where owners' shares do."""
    changes = "parallel.tsp=2 parallel.tsp_layout=owner model.ffn_hidden_size=255"
    first, last = (simulated(2, changes, rank) for rank in (0, 1))
    assert first.weights > last.weights
    assert simulated_peak(config(2, changes), 2) == max(first, last, key=lambda found: found.peak)


def test_a_gpus_allocator_is_not_guessed():
    assert simulated_memory(config(1, "launch.device=cuda"), 1, 0).allocated is None


def test_a_gpu_that_is_not_there_is_refused():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ValueError, match="needs a GPU, and torch sees none"):
        one_rank_memory(config(1, "launch.device=cuda"), 1, 0, torch.device("cuda"))
    assert not dist.is_initialized()


def test_one_rank_alone_has_no_peers_to_read_from():
    with pytest.raises(ValueError, match="parallel.overlap=fused needs peers.*use collective"):
        one_rank_memory(config(2, "parallel.tsp=2 parallel.overlap=fused"), 2, 0, CPU)
