"""LoRA on every mesh: loss and adapters' gradients as the dense reference's; all else stays as it is."""

import math
from dataclasses import replace
from fractions import Fraction
from itertools import cycle, product

import pytest
import torch
from distributed import run_distributed
from lora import Job, Low, adapted, build, check, config, fp32_bound, twice_dense_bound, weights
from parity import MODEL, OLMO2, YARN, Case, batch, case, relative_error, run_step
from runs import full_state, overrides, start_training, write_corpus
from test_kernels import triton
from test_traffic import EVEN, Counted, expected, times
from torch import Tensor
from torch.distributed.tensor import DTensor

from megatsp.axes import Axes
from megatsp.compose import compose
from megatsp.model.gpt import adapter_shapes, count_parameters
from megatsp.model.init import initial_slice
from megatsp.model.parallelize import DTYPES, build_model
from megatsp.schema import MATRICES, Config, FinetuneConfig, OptimizerConfig
from megatsp.training.flops import flops_per_token
from megatsp.training.memory import predict
from megatsp.training.optimizer import MOMENTS, AdamW, clip_gradients
from megatsp.validate import validate

RECOMPUTE = ("none", "selective", "full")
MODELS = (
    dict(num_query_groups=2, add_qkv_bias=True, untie_embeddings_and_output_weights=True),
    dict(num_query_groups=4, qk_layernorm=True),
    dict(num_query_groups=4, **OLMO2),
    dict(num_query_groups=2, qk_layernorm=True, add_qkv_bias=True, norm_position="after"),
    dict(num_query_groups=8),
)
TARGETS = (MATRICES, ("q_proj", "v_proj"), MATRICES, ("down_proj",), ("o_proj", "up_proj"))


def jobs(tsp: int) -> list[Job]:
    """Both layouts and all recompute settings; models, targets, exchanges and bucket counts in turn."""
    models, targets, counts = cycle(MODELS), cycle(TARGETS), cycle([2, 1, 3])
    found = []
    for layout, recompute, exchange in zip(
        ("hidden", "owner") * 3, RECOMPUTE * 2, ("allgather", "ring", "ring") * 2, strict=True
    ):
        count = next(counts)
        case_ = case(
            tsp, recompute, tsp_layout=layout, kv_exchange=exchange, head_buckets=count,
            attention_buckets=min(count, 2), mlp_buckets=count * tsp if layout == "owner" else count,
            **next(models),
        )  # fmt: skip
        found.append((case_, Low(targets=next(targets))))
    return found


@pytest.mark.parametrize("tsp", [1, 2, 4])
def test_gradients_are_the_dense_ones(tsp):
    check(jobs(tsp), tsp, fp32_bound)


def test_eight_ranks():
    found = [(case(8, "selective", tsp_layout="owner"), Low()), (case(8, "full", **OLMO2), Low())]
    check(found, 8, fp32_bound)


AFTER = dict(norm_position="after", qk_layernorm=True, rotary_scaling=YARN, no_rope_freq=2)
SCHEMES: dict[int, list[Case]] = {
    2: [
        case(tp=2, add_qkv_bias=True, qk_layernorm=True, mlp_buckets=2),
        case(tp=2, recompute="full", attention_buckets=2, micro_batches=2),
        case(tp=2, recompute="selective", **AFTER),
        case(cp=2, kv_exchange="ring"),
        case(cp=2, kv_exchange="ulysses", recompute="full"),
        case(cp=2, fsdp_over_cp=True, add_qkv_bias=True),
        case(dp_shard=2, hidden_size=41),  # uneven, and cut within dim 0
        case(dp_replicate=2, recompute="selective"),
        replace(case(2, attention_buckets=2), documents=True),
    ],
    4: [
        case(2, dp_shard=2, micro_batches=2, mlp_buckets=3),
        case(2, "full", dp_shard=2, tsp_layout="owner", hidden_size=42),
        case(2, "selective", dp_replicate=2, **OLMO2),
        case(dp_shard=4, hidden_size=41),  # more ranks than rows of A
        case(dp_replicate=2, dp_shard=2),
        case(2, cp=2, kv_exchange="hierarchical"),
        case(2, "full", cp=2, kv_exchange="ulysses", tsp_layout="owner"),
        case(tp=2, dp_shard=2, recompute="full"),
        replace(case(tp=2, cp=2, fsdp_over_cp=True), documents=True),
    ],
}


@pytest.mark.parametrize("world_size", SCHEMES)
def test_every_scheme(world_size):
    check([(case_, Low()) for case_ in SCHEMES[world_size]], world_size, fp32_bound)


def test_bf16_error_is_at_most_twice_the_dense_one():
    found = [
        case(2, "none", "bf16", attention_buckets=2),
        case(2, "full", "bf16", tsp_layout="owner"),
        case(dp_shard=2, dtype="bf16", recompute="selective"),
        case(tp=2, dtype="bf16"),
        case(cp=2, dtype="bf16", kv_exchange="ring", attention_buckets=2, mlp_buckets=2),
    ]
    check([(case_, Low()) for case_ in found], 2, twice_dense_bound)


# The interpreter is slow.
TINY = dict(hidden_size=20, num_attention_heads=4, kv_channels=4, ffn_hidden_size=21, num_query_groups=2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="CPU ranks need the interpreter")
def test_in_products_that_bring_weights_and_on_triton():
    fused = dict(overlap="fused", attention_buckets=2, mlp_buckets=3, **TINY)
    found = [
        replace(case(2, "full", add_qkv_bias=True, **fused), samples=1, length=16),
        replace(triton(2, "selective", qk_layernorm=True, **TINY | dict(kv_channels=8)), length=16),
    ]
    check([(case_, Low()) for case_ in found], 2, fp32_bound)


# An epsilon beside which no gradient is noise: a step would be of full size whatever its sign.
SETTINGS = OptimizerConfig(lr=0.01, weight_decay=0.3, adam_eps=1e-4, clip_grad=0.5)
State = dict[str, Tensor]


def rank_steps(found: list[Job]) -> list[tuple[list[float], State]]:
    """On a rank: three steps; norms of the gradients and what the weights become."""
    results = []
    for job in found:
        gpt, axes = build(job, weights(job[0].model, job[1]))
        before = {name: p.to_local().clone() for name, p in gpt.named_parameters() if not p.requires_grad}
        optimizer, norms = AdamW(gpt, SETTINGS), []
        for _ in range(3):
            run_step(job[0], gpt, axes)
            norms.append(clip_gradients(gpt, SETTINGS.clip_grad).item())
            optimizer.step(SETTINGS.lr)
            assert all(p.grad is None for p in gpt.parameters())
        named = dict(gpt.named_parameters())
        for name, weight in before.items():
            assert ".lora_" not in name and torch.equal(named[name].to_local(), weight)
            assert weight.dtype == DTYPES[job[0].dtype]
        trained = [name for name in named if ".lora_" in name]
        assert optimizer.tensors().keys() == {f"optimizer.{m}.{name}" for m in MOMENTS for name in trained}
        assert {named[name].dtype for name in trained} == {torch.float32}
        results.append((norms, {name: named[name].detach().full_tensor() for name in trained}))
    return results


def test_steps_are_torchs_and_move_adapters_alone():
    exact = [(replace(case(2), samples=4), Low()), (replace(case(dp_shard=2), samples=2), Low())]
    rounded = (replace(case(dp_shard=2, dtype="bf16"), samples=2), Low())
    dense = adapted(MODEL, Low())
    dense.load_state_dict(weights(MODEL, Low()))
    trained = [p for p in dense.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, SETTINGS.lr, (SETTINGS.adam_beta1, SETTINGS.adam_beta2), SETTINGS.adam_eps,
        SETTINGS.weight_decay,
    )  # fmt: skip
    norms = []
    for _ in range(3):
        dense.loss(*batch(4)).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(trained, SETTINGS.clip_grad).item())
        optimizer.step()
        optimizer.zero_grad()
    assert min(norms) > 2 * SETTINGS.clip_grad
    *results, (in_bf16, _) = run_distributed(rank_steps, 2, [*exact, rounded])[0]
    for found, state in results:
        assert found == pytest.approx(norms, rel=1e-5)
        for name, p in dense.named_parameters():
            if p.requires_grad:
                old = weights(MODEL, Low())[name]
                assert relative_error(state[name] - old, p.detach() - old) < 1e-4, name
    assert in_bf16 == pytest.approx(norms, rel=0.05)


def rank_resume(configs: list[Config]) -> list[State]:
    """On a rank: what the first run ends with, and what the others find in its folder."""
    training = start_training(configs[0])
    training.run()
    return [full_state(training), *(full_state(start_training(other)) for other in configs[1:])]


def test_a_run_is_resumed_on_another_mesh(tmp_path):
    write_corpus(tmp_path / "corpus")
    meshes = ["parallel.tsp=2"], ["parallel.tp=2"], ["parallel.tsp=2", "parallel.tsp_layout=owner"], []
    short = ["trainer.train_iters=2", "scheduler.lr_warmup_iters=1", "trainer.eval_iters=1"]
    tuned = FinetuneConfig(lora_rank=3)  # of first weights: megatsp sft has those of a checkpoint
    runs = [compose(overrides(tmp_path / "corpus", tmp_path, *short, *mesh)) for mesh in meshes]
    configs = [replace(run, finetune=tuned) for run in runs]
    first, *others = run_distributed(rank_resume, 2, configs)[0]
    moments = [tensor for name, tensor in first.items() if name.startswith("optimizer.")]
    assert len(moments) == 2 * 2 * 2 * len(MATRICES) and all(moment.any() for moment in moments)
    for state in others:
        assert state.keys() == first.keys()
        assert not [name for name, tensor in state.items() if not torch.equal(tensor, first[name])]


def rank_first(found: list[tuple[Case, int]]) -> list[State]:
    """On a rank: the first values of every adapter."""
    results = []
    for case_, rank in found:
        job = case_, Low(rank)
        gpt = build_model(config(job), Axes.build(case_.parallel, torch.device("cpu")))
        named = {name: p for name, p in gpt.named_parameters() if p.requires_grad}
        assert all(isinstance(p, DTensor) for p in named.values())
        results.append({name: p.detach().full_tensor() for name, p in named.items()})
    return results


def test_every_mesh_starts_from_the_same_adapters():
    meshes = [case(2), case(2, tsp_layout="owner"), case(tp=2), case(dp_shard=2), case(cp=2)]
    alone, *others = run_distributed(rank_first, 2, [(mesh, 3) for mesh in meshes])[0]
    for state in others:
        assert state.keys() == alone.keys()
        assert all(torch.equal(tensor, alone[name]) for name, tensor in state.items())
    assert {name: tuple(t.shape) for name, t in alone.items()} == adapter_shapes(MODEL, Low(3).finetune())
    for name, tensor in alone.items():
        if name.endswith("lora_B.weight"):
            assert not tensor.any()
        else:
            std = 1 / math.sqrt(3 * tensor.shape[1])
            drawn = initial_slice(1234, name, (0, tensor.shape[1]), (0, 3), 3, std)
            assert torch.equal(tensor, drawn.t())
            assert tensor.std().item() == pytest.approx(std, rel=0.25)  # of 120 to 321 numbers


def rank_counts(found: list[Job]) -> list[tuple[Counted, Counted]]:
    """On a rank: what forward and backward of each job move."""
    results = []
    for job in found:
        axes = Axes.build(job[0].parallel, torch.device("cpu"))
        gpt = build_model(config(job), axes)
        local = axes.take_local(torch.arange(3 * 48).view(3, 48) % job[0].model.vocab_size)
        loss = gpt(local, local, torch.ones(local.shape)).sum()
        traffic = axes.traffic
        forward = {k: (n, traffic.bytes[k]) for k, n in traffic.elements.items()}
        loss.backward()
        both = {k: (n, traffic.bytes[k]) for k, n in traffic.elements.items()}
        backward = {k: tuple(a - b for a, b in zip(n, forward.get(k, (0, 0)), strict=True))
                    for k, n in both.items()}  # fmt: skip
        results.append((forward, {k: v for k, v in backward.items() if v[0]}))
    return results


def with_adapters(job: Job) -> tuple[Counted, Counted]:
    """The formulas of test_traffic.py without what frozen weights do not move, and with adapters.

    In the forward their sides of width h arrive with the gains, in the compute dtype; in the backward the
    fp32 gradients of both sides are all-reduced, which counts twice. No gradient of a weight moves.
    """
    (case_, low), size = job, DTYPES[job[0].dtype].itemsize
    forward, backward = expected(case_)
    m, count = case_.model, len(low.targets)
    rows = m.num_layers * (2 + low.rank * count) * m.hidden_size + m.hidden_size
    forward["small"] = rows, rows * size
    backward = {k: n for k, n in backward.items() if not k.endswith("/gradients") or k == "kv/gradients"}
    del backward["embedding/backward"]
    elements = 2 * sum(a * b for a, b in adapter_shapes(m, low.finetune()).values())
    backward["small"] = elements, 4 * elements
    return forward, backward


@pytest.mark.parametrize(("tsp", "dtype"), [(2, "fp32"), (4, "bf16")])
def test_no_gradient_of_a_weight_travels(tsp, dtype):
    found = [
        (case(tsp, recompute, dtype, tsp_layout=layout, mlp_buckets=2 * tsp, **EVEN), Low(4, targets=targets))
        for (layout, targets), recompute in product(
            (("hidden", MATRICES), ("owner", ("q_proj", "down_proj"))), ("selective", "full")
        )
    ]
    for counts in run_distributed(rank_counts, tsp, found):
        for job, of_job in zip(found, counts, strict=True):
            for actual, whole in zip(of_job, with_adapters(job), strict=True):
                assert actual == times(whole, Fraction(tsp - 1, tsp)), job


def test_flops_are_of_what_is_needed():
    """Forward and dx of what is frozen, forward, dx and dW of adapters, attention as ever."""
    finetune = FinetuneConfig(lora_rank=3, lora_targets=["q_proj", "down_proj"])
    h, ffn, heads = MODEL.hidden_size, MODEL.ffn_hidden_size, 8 * 6
    adapters = MODEL.num_layers * 3 * (h + heads + ffn + h)
    frozen = count_parameters(MODEL)  # the embedding is tied: it multiplies as the head
    attention = 12 * 32 / 2 * MODEL.num_layers * heads
    assert flops_per_token(MODEL, 32, finetune) == 4 * frozen + 6 * adapters + attention
    assert flops_per_token(MODEL, 32, FinetuneConfig()) == flops_per_token(MODEL, 32)


@pytest.mark.parametrize(("dtype", "size"), [("fp32", 4), ("bf16", 2)])
def test_memory_has_no_gradients_of_what_is_frozen(dtype, size):
    case_ = case(2, "full", dtype)
    full = config((case_, Low(3)))
    held = predict(full)
    shapes = adapter_shapes(MODEL, full.finetune)
    of_h = {name: name.endswith("A.weight") != ("o_proj" in name or "down" in name) for name in shapes}
    adapters = sum(a * b // (2 if of_h[name] else 1) for name, (a, b) in shapes.items())
    frozen = count_parameters(MODEL) // 2  # all of it has h, which is even
    assert held.weights == size * frozen + 4 * adapters
    assert (held.gradients, held.optimizer) == (4 * adapters, 8 * adapters)
    kept = predict(replace(full, finetune=FinetuneConfig())).saved_activations
    assert held.saved_activations == kept + MODEL.num_layers * 7 * 3 * MODEL.hidden_size * size


def test_a_rank_above_its_matrix_is_refused():
    tuned = replace(Config(), finetune=FinetuneConfig(lora_rank=65, lora_targets=["q_proj", "k_proj"]))
    with pytest.raises(ValueError, match="lora_rank=65: k_proj is 64 x 128; use at most 64"):
        validate(tuned, 1)
    validate(replace(tuned, finetune=replace(tuned.finetune, lora_targets=["q_proj"])), 1)
