"""What a step moves, counted by the program, equals design.md's formulas exactly.

Per layer forward every rank receives (D-1)/D of

    2 B T K d                               keys and values
    (2 H d + 2 K d) h + 3 ffn h             weights of attention and of the MLP

elements, which for H d = h, g = H/K, F = ffn/h is design.md's 2BTh/g + (2 + 2/g + 3F) h^2. The
backward moves the weights and the keys and values again, and the gradients of both.

`full` recompute moves LESS than design.md's "the forward's a second time": a gated MLP's backward
needs the MLP's input alone, so only the attention part runs, and travels, again.

Small terms that design.md leaves out, all times (D-1)/D: the gathered norm gains (2h a layer, h for
the head); their gradients and those of other vectors by one all-reduce, which counts twice; the
head's weights, twice, and their gradients (V h each); for the embedding B T ids, and B T h/D
elements to the tokens' ranks and back.

A norm of q and k over all heads (OLMo2) makes attention walk several buckets twice: its weights move
twice as often, forward and backward; their gradients, keys and values do not. Its gains are H d + K d.

Under `owner` a rank receives all but what it holds itself, so where the owners' shares differ the
formulas hold for the sum over ranks: they are compared as D-1 times the whole.
"""

from dataclasses import replace
from fractions import Fraction
from itertools import product

import pytest
import torch
from distributed import run_distributed
from parity import OLMO2, Case, case, load, weights

from megatsp.axes import Axes
from megatsp.model.gpt import GPT
from megatsp.model.parallelize import DTYPES, build_model

B, T = 3, 48
Counted = dict[str, tuple[int, int]]  # label: elements, bytes

# Nothing here is divided unevenly, so every rank's counts are equal.
EVEN = dict(
    hidden_size=48, num_attention_heads=8, kv_channels=6, ffn_hidden_size=96, num_query_groups=4,
    attention_buckets=4, head_buckets=2,
)  # fmt: skip
# FFN columns and heads that owners hold unequal shares of, biases and head gains.
UNEVEN = dict(
    hidden_size=40, num_attention_heads=6, kv_channels=6, ffn_hidden_size=107, num_query_groups=3,
    attention_buckets=3, head_buckets=3, add_qkv_bias=True, qk_layernorm=True,
)  # fmt: skip


def rank_counts(cases: list[Case]) -> list[tuple[Counted, Counted]]:
    """On a rank: what the forward and what the backward of each case moved."""
    found = []
    for case_ in cases:
        axes = Axes.build(case_.parallel, torch.device("cpu"))
        gpt = build_model(case_.config(), axes)
        load(gpt, weights(case_.model))
        traffic = axes.traffic
        local = axes.take_local(torch.arange(B * T).view(B, T) % case_.model.vocab_size)
        loss = gpt(local, local, torch.ones(local.shape)).sum()
        forward = {k: (n, traffic.bytes[k]) for k, n in traffic.elements.items()}
        loss.backward()
        backward = {
            k: (n - forward.get(k, (0, 0))[0], traffic.bytes[k] - forward.get(k, (0, 0))[1])
            for k, n in traffic.elements.items()
        }
        found.append((forward, {k: v for k, v in backward.items() if v[0]}))
    return found


def expected(case_: Case) -> tuple[Counted, Counted]:
    """Elements and bytes of forward and backward, before the factor (D-1)/D."""
    m, layers, again = case_.model, case_.model.num_layers, case_.recompute == "full"
    h, query, kv = m.hidden_size, m.num_attention_heads * m.kv_channels, m.num_query_groups * m.kv_channels
    attention = layers * (2 * query + 2 * kv) * h
    wide = m.qk_layernorm_width == "all"
    walks = 2 if wide and case_.parallel.attention_buckets > 1 else 1
    mlp = layers * 3 * m.ffn_hidden_size * h
    head = m.vocab_size * h
    keys_values = layers * 2 * B * T * kv
    embedded = B * T * h // case_.parallel.tsp
    gains = layers * 2 * h + h
    vectors = layers * (
        m.add_qkv_bias * (query + 2 * kv) + m.qk_layernorm * (query + kv if wide else 2 * m.kv_channels)
    )
    forward = {
        "attention/weights": walks * attention, "mlp/weights": mlp, "head/weights": head,
        "kv/forward": keys_values, "small": gains,
        "embedding/ids": B * T, "embedding/forward": embedded,
    }  # fmt: skip
    backward = {
        "attention/weights": (1 + again) * walks * attention, "mlp/weights": mlp, "head/weights": head,
        "attention/gradients": attention, "mlp/gradients": mlp, "head/gradients": head,
        "kv/backward": keys_values, "kv/gradients": keys_values, "small": 2 * (gains + vectors),
        "embedding/backward": embedded,
    }  # fmt: skip
    if again:
        backward["kv/forward"] = keys_values

    def element_size(label: str) -> int:
        """Gradients, gains and ids (as int32) have 4 bytes; the rest travels in the compute dtype."""
        always_four = label in ("small", "embedding/ids") or label.endswith("/gradients")
        return 4 if always_four else DTYPES[case_.dtype].itemsize

    def with_bytes(elements: dict[str, int]) -> Counted:
        return {label: (n, n * element_size(label)) for label, n in elements.items()}

    return with_bytes(forward), with_bytes(backward)


def cases(tsp: int, dtype: str, sizes: dict) -> list[Case]:
    found = []
    for layout, exchange, recompute in product(
        ("hidden", "owner"), ("allgather", "ring"), ("none", "selective", "full")
    ):
        keys = dict(tsp_layout=layout, kv_exchange=exchange, mlp_buckets=2 * tsp, **sizes)
        found.append(case(tsp, recompute, dtype, **keys))
    return found


def times(whole: Counted, factor: Fraction) -> Counted:
    """The counts times a factor that leaves them whole numbers."""
    products = {k: (elements * factor, size * factor) for k, (elements, size) in whole.items()}
    assert all(n.denominator == 1 for pair in products.values() for n in pair)
    return {k: (int(elements), int(size)) for k, (elements, size) in products.items()}


@pytest.mark.parametrize(("tsp", "dtype"), [(2, "fp32"), (4, "fp32"), (4, "bf16")])
def test_every_rank_moves_what_the_formulas_say(tsp, dtype):
    found = cases(tsp, dtype, EVEN)
    if tsp == 2:  # in four buckets, which are walked twice, and in one
        found += cases(tsp, dtype, EVEN | OLMO2)[::2]
        found += cases(tsp, dtype, EVEN | OLMO2 | dict(attention_buckets=1))[:3]
    for counts in run_distributed(rank_counts, tsp, found):
        for case_, of_case in zip(found, counts, strict=True):
            for actual, whole in zip(of_case, expected(case_), strict=True):
                assert actual == times(whole, Fraction(tsp - 1, tsp)), case_


@pytest.mark.parametrize("tsp", [2, 4])
def test_uneven_shares_move_as_much_in_sum(tsp):
    found = cases(tsp, "fp32", UNEVEN)
    per_rank = run_distributed(rank_counts, tsp, found)
    for index, case_ in enumerate(found):
        for direction, whole in enumerate(expected(case_)):
            ranks = [counts[index][direction] for counts in per_rank]
            total = {k: tuple(sum(r[k][i] for r in ranks) for i in (0, 1)) for k in ranks[0]}
            assert total == times(whole, Fraction(tsp - 1)), case_


def test_one_rank_moves_nothing():
    for counts in run_distributed(rank_counts, 1, cases(1, "fp32", EVEN)):
        assert counts == [({}, {})] * 12


@pytest.mark.parametrize("tsp", [2, 4])
def test_a_layer_moves_the_designs_closed_form(tsp):
    """One layer more, and nothing else, costs 2BTh/g + (2 + 2/g + 3F) h^2 in the forward."""
    base = case(tsp, tsp_layout="hidden", mlp_buckets=3, **EVEN)
    layers = [replace(base, model=replace(base.model, num_layers=n)) for n in (1, 2)]
    h, g, f = 48, 2, 2
    closed = Fraction(2 * B * T * h, g) + (2 + Fraction(2, g) + 3 * f) * h**2
    for counts in run_distributed(rank_counts, tsp, layers):
        totals = [sum(n for k, (n, _) in forward.items() if k != "small") for forward, _ in counts]
        assert totals[1] - totals[0] == closed * (tsp - 1) / tsp
        gradients = [sum(n for k, (n, _) in backward.items() if k != "small") for _, backward in counts]
        assert gradients[1] - gradients[0] == 2 * closed * (tsp - 1) / tsp


def rank_forward_only() -> dict[str, int]:
    case_ = case(2, "full", **EVEN)
    axes = Axes.build(case_.parallel, torch.device("cpu"))
    gpt: GPT = build_model(case_.config(), axes)
    local = axes.take_local(torch.zeros(B, T, dtype=torch.int64))
    with torch.no_grad():
        for _ in range(2):
            gpt(local, local, torch.ones(local.shape))
    return dict(axes.traffic.elements)


def test_evaluation_moves_the_forward_alone_each_time():
    forward, _ = expected(case(2, "full", **EVEN))
    for counts in run_distributed(rank_forward_only, 2):
        assert counts == {k: n for k, (n, _) in times(forward, Fraction(2 * 1, 2)).items()}
