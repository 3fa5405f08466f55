"""Packed documents: loss and every gradient equal a reference that runs each document by itself."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle

import pytest
import torch
import torch.nn.functional as F
from dense import DenseGPT
from distributed import run_distributed
from parity import (
    OLMO2,
    YARN,
    Case,
    batch,
    case,
    check,
    dense_result,
    fp32_bound,
    job,
    load,
    packed,
    rank_errors,
    twice_dense_bound,
    weights,
)
from test_kernels import KEYS, triton

from megatsp.axes import Axes
from megatsp.model.parallelize import build_model
from megatsp.schema import KernelsConfig, RotaryScaling
from megatsp.tsp.partition import take_local

MODELS = (
    dict(num_query_groups=8),
    dict(num_query_groups=2, add_qkv_bias=True, untie_embeddings_and_output_weights=True),
    dict(num_query_groups=1, qk_layernorm=True),
)
SCHEMES: dict[int, list[dict]] = {
    1: [dict(recompute=r) for r in ("none", "selective", "full")],
    2: [
        *(dict(tsp=2, tsp_layout=layout, kv_exchange=exchange)
          for layout in ("hidden", "owner") for exchange in ("allgather", "ring")),
        *(dict(cp=2, kv_exchange=exchange) for exchange in ("allgather", "ring", "ulysses")),
        dict(cp=2, fsdp_over_cp=True),
        dict(tp=2),
        dict(dp_shard=2),
        dict(tsp=2, micro_batches=2),
    ],
    4: [
        dict(tsp=4, attention_buckets=2),
        dict(tsp=4, tsp_layout="owner", kv_exchange="ring"),
        dict(cp=4, kv_exchange="ulysses"),
        dict(tp=2, cp=2, kv_exchange="ring"),
        dict(cp=2, tsp=2, kv_exchange="hierarchical"),
        dict(cp=2, tsp=2, kv_exchange="hierarchical", tsp_layout="owner"),
        dict(tsp=2, dp_shard=2),
    ],
    8: [
        dict(tsp=8, kv_exchange="ring"),
        dict(tsp=8, tsp_layout="owner"),
        dict(cp=4, tsp=2, kv_exchange="hierarchical", fsdp_over_cp=True),
        dict(dp_replicate=2, tp=2, cp=2, kv_exchange="allgather"),
    ],
}  # fmt: skip


def cases(schemes: Sequence[dict], dtype: str = "fp32") -> list[Case]:
    """Recompute settings and models are cycled through the schemes."""
    found = []
    for scheme, recompute, model in zip(
        schemes, cycle(("none", "selective", "full")), cycle(MODELS), strict=False
    ):
        keys = dict(recompute=recompute, dtype=dtype) | model | scheme
        if keys.get("kv_exchange") == "ulysses":
            keys["num_query_groups"] = 8
        heads_at_once = keys.get("tp", 1) * keys.get("attention_buckets", 1)
        keys["num_query_groups"] = max(keys["num_query_groups"], heads_at_once)
        found.append(replace(case(**keys), documents=True))
    return found


STILL = dict(rotary_scaling=YARN, no_rope_freq=2)
FAMILIES = {
    1: [],
    2: [
        case(2, "selective", attention_buckets=2, **OLMO2),
        case(2, "full", tsp_layout="owner", kv_exchange="ring", **OLMO2),
        case(recompute="none", cp=2, kv_exchange="ring", **STILL),
        case(recompute="full", tp=2, norm_position="after", **STILL),
    ],
    4: [case(2, "none", cp=2, kv_exchange="hierarchical", attention_buckets=2, rotary_scaling=YARN, **OLMO2)],
    8: [],
}


@pytest.mark.parametrize("world_size", SCHEMES)
def test_fp32(world_size):
    families = [replace(each, documents=True) for each in FAMILIES[world_size]]
    check(cases(SCHEMES[world_size]) + families, world_size, fp32_bound)


@pytest.mark.parametrize(
    ("world_size", "schemes"),
    [
        (2, [dict(tsp=2), dict(cp=2, kv_exchange="ring"), dict(tp=2)]),
        (4, [dict(tsp=4, tsp_layout="owner"), dict(cp=2, tsp=2, kv_exchange="hierarchical")]),
    ],
)
def test_bf16_error_is_at_most_twice_the_dense_one(world_size, schemes):
    check(cases(schemes, "bf16"), world_size, twice_dense_bound)


# Those that know of documents; tests/test_kernels.py has them all.
TRITON = KernelsConfig(**dict.fromkeys(KEYS, "torch") | dict(attention="triton", rotary="triton"))


def fused(*args, **keys) -> Case:
    """On the kernels that know of documents: small, for the interpreter."""
    keys = dict(num_attention_heads=2, attention_buckets=1) | keys
    return replace(triton(*args, **keys), kernels=TRITON, samples=2, length=16, documents=True)


@pytest.mark.parametrize(
    ("world_size", "found"),
    [
        (2, [fused(2, "none", qk_layernorm=True),
             fused(2, "selective", kv_exchange="ring", tsp_layout="owner"),
             fused(1, "full", cp=2, kv_exchange="ulysses")]),
        (4, [fused(2, "full", cp=2, kv_exchange="hierarchical")]),
    ],
)  # fmt: skip
def test_triton(world_size, found):
    check(found, world_size, fp32_bound)


def test_documents_matter():
    """The control: a reference that ignores them has another loss, and a model that does is found out."""
    case_ = replace(case(2), documents=True)
    apart, _ = dense_result(case_.model, case_.samples, torch.float32, documents=True)
    ids, labels, mask, first = packed(case_.samples)
    dense = DenseGPT(case_.model)
    dense.load_state_dict(weights(case_.model))
    with torch.no_grad():
        together = dense.loss(ids, labels, mask).item()
    assert abs(apart - together) > 1e-3
    _, *rest = job(case_)
    for errors in run_distributed(rank_errors, 2, [(replace(case_, documents=False), *rest)]):
        assert min(errors[0].values()) > 1e-3
    assert (first > 0).any() and (first == 0).all(1).any()


LLAMA3 = RotaryScaling("llama3", factor=8.0, original_max_position_embeddings=16)


def rank_token_losses(case_: Case, documents: bool) -> list[torch.Tensor]:
    """On one rank, by sample and document: the losses of its tokens; packed, or each run by itself."""
    axes = Axes.build(case_.parallel, torch.device("cpu"))
    gpt = build_model(case_.config(), axes)
    load(gpt, weights(case_.model))
    ids, labels, _, first = packed(case_.samples, case_.length)
    with torch.no_grad():
        if documents:
            losses = gpt(ids, labels, torch.ones(ids.shape), first)
        found = []
        for sample in range(case_.samples):
            begins, counts = first[sample].unique_consecutive(return_counts=True)
            for begin, count in zip(begins.tolist(), counts.tolist(), strict=True):
                its = slice(begin, begin + count)
                if documents:
                    found.append(losses[sample, its])
                    continue
                # An even number of tokens; what follows a token does not change it.
                alone = [F.pad(t[sample, None, its], (0, count % 2)) for t in (ids, labels)]
                found.append(gpt(*alone, torch.ones(alone[0].shape))[0, :count])
    return found


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_a_packed_document_has_the_losses_of_the_document_alone(kernels):
    sizes = dict(rotary_scaling=LLAMA3, add_qkv_bias=True, qk_layernorm=True, kv_channels=8)
    case_ = replace(case(1, num_query_groups=2, num_layers=1, **sizes), samples=2, length=18)
    if kernels == "triton":
        case_ = replace(case_, kernels=TRITON)
    (packed_losses,) = run_distributed(rank_token_losses, 1, case_, True)
    (alone,) = run_distributed(rank_token_losses, 1, case_, False)
    assert len(alone) == len(packed_losses) > 5 and {len(losses) for losses in alone} >= {1, 12}
    for actual, expected in zip(packed_losses, alone, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=3e-6)


def rank_masked(case_: Case) -> list[list[tuple[bool, float]]]:
    """On a rank, where no token carries loss, and where one rank's do: is a gradient finite; its norm."""
    axes = Axes.build(case_.parallel, torch.device("cpu"))
    gpt = build_model(case_.config(), axes)
    load(gpt, weights(case_.model))
    ids, labels, _, first = packed(case_.samples, case_.length)
    found = []
    for weighed_rank in (None, 1):
        mask = torch.zeros(axes.take_local(ids).shape)
        if axes.sequence.rank == weighed_rank:
            mask[:, -1] = 1
        gpt.zero_grad()
        losses = gpt(axes.take_local(ids), axes.take_local(labels), mask, first)
        losses.sum().backward()
        assert losses.isfinite().all()
        gradients = [p.grad.full_tensor() for p in gpt.parameters()]
        found.append([(bool(g.isfinite().all()), g.norm().item()) for g in gradients])
    return found


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_nothing_but_padding_gives_zeros_and_a_rank_without_loss_no_nan(kernels):
    case_ = fused(2, "none") if kernels == "triton" else replace(case(2), samples=4)
    for none, some in run_distributed(rank_masked, 2, case_):
        assert all(finite for finite, _ in none + some)
        assert all(norm == 0 for _, norm in none) and all(norm > 0 for _, norm in some)


def rank_positions(schemes: list[dict]) -> bool:
    """On a rank: whether the tokens that attention has count from the starts of their documents."""
    equal = []
    for scheme in schemes:
        case_ = case(**scheme)
        axes = Axes.build(case_.parallel, torch.device("cpu"))
        engine = build_model(case_.config(), axes).engine
        ids, _, _, first = packed(4)
        own = axes.take_local(ids)
        found = engine.positions(own, engine.documents(own, first))
        expected = take_local(torch.arange(ids.shape[1]) - first, axes.sequence.rank, axes.sequence.size)
        equal.append(torch.equal(found, expected[:, None]))
    return all(equal)


def test_positions_restart():
    """Asserted on the numbers: rotated scores depend on differences alone, so losses cannot tell."""
    assert all(run_distributed(rank_positions, 4, [dict(tsp=4), dict(tp=2, cp=2), dict(tp=4)]))


def test_what_is_no_batch_of_documents_is_refused():
    for said in run_distributed(rank_refusals, 2):
        assert said[0] == "first must be of the whole sequence, (3, 48); got (3, 24)"
        assert said[1].startswith("first must give the position of the first token")


def rank_refusals() -> list[str]:
    case_ = case(2)
    axes = Axes.build(case_.parallel, torch.device("cpu"))
    gpt = build_model(case_.config(), axes)
    local = [axes.take_local(t) for t in batch(3)]
    said = []
    for first in (torch.zeros(3, 24, dtype=torch.int64), torch.ones(3, 48, dtype=torch.int64)):
        try:
            gpt(*local, first)
        except ValueError as error:
            said.append(str(error))
    return said
