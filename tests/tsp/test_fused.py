"""Weights and gradients that travel inside products: losses, gradients and traffic as with collectives."""

import gc
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed import run_distributed
from parity import OLMO2, Case, batch, case, check, fp32_bound, load, weights
from test_traffic import rank_counts

from megatsp.axes import Axes
from megatsp.model.parallelize import build_model

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="CPU ranks need the interpreter")

# Small: the interpreter is slow. h/D, FFN width and buckets are odd where they can be.
SIZES = dict(hidden_size=20, num_attention_heads=4, kv_channels=4, ffn_hidden_size=21)
FUSED = dict(overlap="fused", attention_buckets=2, mlp_buckets=3, num_query_groups=2, **SIZES)


@pytest.mark.parametrize(
    ("tsp", "cases"),
    [
        (
            2,
            [
                case(2, "none", add_qkv_bias=True, qk_layernorm=True, **FUSED),
                case(2, "full", micro_batches=2, **FUSED),
            ],
        ),
        (4, [case(4, "selective", **FUSED, **OLMO2)]),
    ],
)
def test_losses_and_gradients_equal_the_dense_ones(tsp, cases):
    check(cases, tsp, fp32_bound)


def test_beside_data_parallel_ranks():
    check([case(2, "none", dp_shard=2, **{**FUSED, "num_layers": 1})], 4, fp32_bound)


def test_it_moves_what_collectives_move():
    fused = case(2, "full", **FUSED, **OLMO2)
    collective = replace(fused, parallel=replace(fused.parallel, overlap="collective"))
    for counts in run_distributed(rank_counts, 2, [fused, collective]):
        assert counts[0] == counts[1]
        assert counts[0][0]["mlp/weights"][0] > 0 and counts[0][1]["mlp/gradients"][0] > 0


def rank_steps(case_: Case, steps: int) -> tuple[Counter, str, list[str]]:
    """On a rank: what carried the buckets, how the overlap was chosen, and what is mapped afterwards."""
    import megatsp_kernels.streamed.exchange as module

    axes = Axes.build(case_.parallel, torch.device("cpu"))
    gpt = build_model(case_.config(), axes)
    seen: Counter = Counter()
    pull, matmul = module.pull, module.matmul_pull

    def counted_pull(job):
        seen["alone"] += 1
        pull(job)

    def counted_matmul(a, b, job):
        seen["carried"] += 1
        return matmul(a, b, job)

    module.pull, module.matmul_pull = counted_pull, counted_matmul
    load(gpt, weights(case_.model))
    tokens = [axes.take_local(t) for t in batch(1)]
    for _ in range(steps):
        gpt(*tokens).sum().backward()
    gpt.engine.check()
    gpt.engine.close()
    chosen = str(gpt.engine.overlap)
    del gpt
    gc.collect()
    return seen, chosen, [m for m in Path("/proc/self/maps").read_text().splitlines() if "megatsp-" in m]


def test_products_carry_all_buckets_but_those_that_none_precedes():
    """Alone: the first of a step, and the first after the head, whose products carry nothing."""
    case_ = case(2, "none", **FUSED)
    buckets = 2 * case_.model.num_layers * (2 + 3)  # forward and backward
    for seen, chosen, mapped in run_distributed(rank_steps, 2, case_, 1):
        assert seen == {"alone": 2, "carried": buckets - 2}
        assert chosen.startswith("fused: shared memory, 0.")
        assert not mapped


def rank_choice(case_: Case, hosts: list[str]) -> str:
    with pytest.MonkeyPatch.context() as patch:
        if hosts:
            patch.setattr("socket.gethostname", lambda: hosts[dist.get_rank()])
        try:
            gpt = build_model(case_.config(), Axes.build(case_.parallel, torch.device("cpu")))
        except ValueError as error:
            return str(error)
        return str(gpt.engine.overlap)


FORCED, END = "parallel.overlap=fused: ", "; use parallel.overlap=auto or collective"


@pytest.mark.parametrize(
    ("tsp", "dtype", "changes", "hosts", "said"),
    [
        (2, "fp32", dict(tsp_layout="owner", mlp_buckets=2), [],
         FORCED + "tsp rank 0: parallel.tsp_layout=owner sends buckets by broadcasts and round a ring" + END),
        (2, "bf16", {}, [],
         FORCED + "tsp rank 0: Triton's interpreter multiplies bf16 wrongly: trainer.dtype=fp32" + END),
        (2, "fp32", {}, ["a", "b"],
         FORCED + "the ranks of the tsp group are on several hosts or containers" + END),
        (2, "fp32", dict(overlap="auto"), [], "collective: the ranks compute on CPUs"),
        (2, "fp32", dict(overlap="collective"), [], "collective: parallel.overlap=collective"),
        (1, "fp32", {}, [], "collective: one tsp rank: nothing travels"),
    ],
)  # fmt: skip
def test_the_choice_is_said_or_refused(tsp, dtype, changes, hosts, said):
    case_ = case(tsp, "none", dtype, **{**FUSED, **changes})
    assert run_distributed(rank_choice, tsp, case_, hosts) == [said] * tsp


def test_without_the_interpreter_a_cpu_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    for said in run_distributed(rank_choice, 2, case(2, **FUSED), []):
        assert said.startswith(FORCED + "tsp rank 0: Triton kernels run on a GPU; the tensors are ")


def rank_broken_memory(case_: Case) -> str:
    import megatsp_kernels.streamed as streamed
    import megatsp_kernels.streamed.exchange as module

    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:  # its slices arrive nowhere
            patch.setattr(module, "publish", lambda *arguments: None)
        patch.setattr(streamed.probe, "__defaults__", (None, 0.2))
        return rank_choice(case_, [])


def test_memory_that_fails_the_probe_is_refused():
    for said in run_distributed(rank_broken_memory, 2, case(2, **FUSED)):
        assert said.startswith(FORCED + "shared memory: rank 1: simulated peers: ") and said.endswith(END)
        assert "'slice of epoch 1': it is at 0" in said
