"""What tensor and context parallelism move, counted by the program, equals their formulas exactly.

Tensor parallelism over S ranks, whose group has T tokens: every rank receives (S-1)/S of

    forward      4 B T h a layer           gathered into attention and into the MLP, scattered out of them
                 B T h  B T h              out of the embedding, into the head
                 B T  B T  2 B T S         ids, labels, and each rank's log-sum-exp and target's logit
    backward     6 B T h a layer           input and output gradient gathered, input gradient scattered
                 B T h  B T h  B T h       into the head again and its gradient out; the embedding's gradient
                 B T                       the losses' gradients
                 4h + 4d a layer, 2h       gradients of norm and head gains, by all-reduces, which count twice

and 2 B T h a layer more under `full` recompute, whose backward runs the attention again. What is gathered
travels in the compute dtype, as do partial sums of one bucket; those of several are fp32.

Context parallelism over S ranks: (S-1)/S of 2 B T K d a layer forward, again in the backward, and as
much of their gradients (tests/cp holds each exchange to its formula).
"""

from collections import Counter
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from distributed import run_distributed
from parity import Case, case
from test_traffic import EVEN, B, Counted, T, rank_counts, times
from torch.utils._python_dispatch import TorchDispatchMode

from megatsp.axes import Axes
from megatsp.model.parallelize import DTYPES, build_model

SIZES = dict(
    hidden_size=48, num_attention_heads=8, kv_channels=6, ffn_hidden_size=107, num_query_groups=4,
    add_qkv_bias=True, qk_layernorm=True,
)  # fmt: skip
RECOMPUTE = ("none", "selective", "full")


def tp_counts(case_: Case) -> tuple[Counted, Counted]:
    """Elements and bytes of forward and backward over tp, before the factor (S-1)/S."""
    m, p, layers = case_.model, case_.parallel, case_.model.num_layers
    again, narrow = case_.recompute == "full", DTYPES[case_.dtype].itemsize
    tokens = B * T // p.cp
    x = tokens * m.hidden_size

    def summed(buckets: int) -> int:
        """Bytes of an element of what is scattered out of so many buckets."""
        return narrow if buckets == 1 else 4

    def both(gathered: int, scattered: int, buckets: int) -> tuple[int, int]:
        """Elements and bytes of so many transfers of x."""
        return (gathered + scattered) * x, (gathered * narrow + scattered * summed(buckets)) * x

    attention, mlp, head = p.attention_buckets, p.mlp_buckets, p.head_buckets
    gains = layers * (2 * m.hidden_size + m.qk_layernorm * 2 * m.kv_channels) + m.hidden_size
    forward = {
        "embedding/ids": (tokens, 4 * tokens),
        "embedding/forward": (x, narrow * x),
        "attention/tokens": both(layers, layers, attention),
        "mlp/tokens": both(layers, layers, mlp),
        "head/tokens": (x, narrow * x),
        "head/labels": (tokens, 8 * tokens),
        "head/loss": (2 * tokens * p.tp, 8 * tokens * p.tp),
    }
    backward = {
        "head/tokens": (x, narrow * x),
        "head/loss": (tokens, 4 * tokens),
        "head/backward": both(0, 1, head),
        "mlp/tokens": both(2 * layers, layers, mlp),
        "attention/tokens": both((2 + again) * layers, (1 + again) * layers, attention),
        "small": (2 * gains, 8 * gains),
        "embedding/backward": (x, narrow * x),
    }
    return forward, backward


def cp_counts(case_: Case) -> tuple[Counted, Counted]:
    """Elements and bytes over cp x tsp, before the factor (S-1)/S; a tp rank has 1/tp of the heads."""
    m, p = case_.model, case_.parallel
    narrow, again = DTYPES[case_.dtype].itemsize, case_.recompute == "full"
    tokens = m.num_layers * B * T * m.kv_channels // p.tp
    if p.kv_exchange == "ulysses":
        n = tokens * (2 * m.num_attention_heads + 2 * m.num_query_groups) // p.cp
        forward = {"ulysses/forward": (n, narrow * n)}
        return forward, {"ulysses/backward": (2 * n, 2 * narrow * n)} | (forward if again else {})
    n = 2 * m.num_query_groups * tokens
    forward = {"kv/forward": (n, narrow * n)}
    backward = {"kv/backward": (n, narrow * n), "kv/gradients": (n, 4 * n)}
    return forward, backward | (forward if again else {})


def check(world_size: int, found: list[Case], wholes) -> None:
    """wholes(case): the formulas of forward and of backward, each a sum over axes with its own factor."""
    for counts in run_distributed(rank_counts, world_size, found):
        for case_, of_case in zip(found, counts, strict=True):
            for actual, whole in zip(of_case, wholes(case_), strict=True):
                assert actual == whole, case_


def expected(case_: Case) -> tuple[Counted, Counted]:
    p, directions = case_.parallel, []
    for over_tp, over_cp in zip(tp_counts(case_), cp_counts(case_), strict=True):
        moved = times(over_tp, Fraction(p.tp - 1, p.tp)) | times(over_cp, Fraction(p.cp - 1, p.cp))
        directions.append({label: count for label, count in moved.items() if count[0]})
    return tuple(directions)


@pytest.mark.parametrize(("tp", "dtype"), [(2, "fp32"), (4, "bf16")])
def test_tensor_parallelism(tp, dtype):
    buckets = (
        dict(mlp_buckets=1, head_buckets=1),
        dict(mlp_buckets=3, head_buckets=2, attention_buckets=4 // tp),
    )
    found = [case(recompute=r, dtype=dtype, tp=tp, **SIZES | some) for r in RECOMPUTE for some in buckets]
    check(tp, found, expected)


@pytest.mark.parametrize(("cp", "dtype"), [(2, "fp32"), (4, "bf16")])
def test_context_parallelism_moves_keys_and_values_alone(cp, dtype):
    found = [case(recompute=r, dtype=dtype, cp=cp, kv_exchange=exchange, mlp_buckets=2, **SIZES)
             for r in RECOMPUTE for exchange in ("allgather", "ring", "ulysses")]  # fmt: skip
    found += [replace(c, parallel=replace(c.parallel, fsdp_over_cp=True)) for c in found[:2]]
    check(cp, found, expected)


def test_tensor_and_context_parallelism_add_up():
    found = [case(recompute=r, tp=2, cp=2, kv_exchange=exchange, mlp_buckets=2, **SIZES)
             for r in RECOMPUTE for exchange in ("allgather", "ring", "ulysses")]  # fmt: skip
    check(4, found, expected)


def test_context_parallelism_around_tsp():
    """Keys and values as over one axis of all ranks, in any exchange; the rest is tsp's own, unchanged."""
    found = [
        case(tsp=2, cp=2, kv_exchange=exchange, **SIZES) for exchange in ("allgather", "ring", "hierarchical")
    ]
    alone = run_distributed(rank_counts, 2, [case(tsp=2, **SIZES)])[0][0]
    halved = ("embedding/ids", "embedding/forward", "embedding/backward")  # a tsp group has half the tokens

    def wholes(case_: Case) -> list[Counted]:
        kept = [
            {
                k: times({k: v}, Fraction(1, 1 + (k in halved)))[k]
                for k, v in of.items()
                if not k.startswith("kv/")
            }
            for of in alone
        ]
        of_four = replace(case_, parallel=replace(case_.parallel, cp=4))
        return [k | times(kv, Fraction(3, 4)) for k, kv in zip(kept, cp_counts(of_four), strict=True)]

    check(4, found, wholes)


class AllTraffic(TorchDispatchMode):
    """Elements that all gathers and reductions over a group, FSDP2's too, bring in or send out."""

    def __init__(self, group_size: int) -> None:
        super().__init__()
        self.group_size, self.elements = group_size, Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if func.namespace == "c10d" and ("allgather" in name or "reduce_scatter" in name):
            whole = max(t.numel() for t in args[:2])
            self.elements["reduce" if "reduce" in name else "gather"] += whole - whole // self.group_size
        return func(*args, **(kwargs or {}))


def rank_all_elements(cases: list[Case]) -> list[tuple[Counter[str], Counter[str]]]:
    """On a rank: elements of each case's forward, and of its backward."""
    found = []
    for case_ in cases:
        axes = Axes.build(case_.parallel, torch.device("cpu"))
        gpt = build_model(case_.config(), axes)
        local = axes.take_local(torch.zeros(B, T, dtype=torch.int64))
        with AllTraffic(axes.cp.size) as forward:
            loss = gpt(local, local, torch.ones(local.shape)).sum()
        with AllTraffic(axes.cp.size) as backward:
            loss.backward()
        found.append((forward.elements, backward.elements))
    return found


@pytest.mark.parametrize("cp", [2, 4])
def test_fsdp_over_cp_moves_what_tsp_does(cp):
    """2BTh/g + (2 + 2/g + 3F) h^2 a layer, there and back; FSDP2's buffers hold the gains, 2h, too."""
    even = dict(cp=cp, fsdp_over_cp=True, **EVEN | dict(mlp_buckets=1, attention_buckets=1))
    found = [case(num_layers=n, **even) for n in (1, 2)]
    h, g, f = EVEN["hidden_size"], 2, 2
    closed = Fraction(2 * B * T * h, g) + (2 + Fraction(2, g) + 3 * f) * h**2
    layer = (closed + 2 * h) * Fraction(cp - 1, cp)
    for one, two in run_distributed(rank_all_elements, cp, found):
        forward, backward = (t - o for o, t in zip(one, two, strict=True))
        assert forward == {"gather": layer}
        assert backward == {"gather": layer, "reduce": layer}


# h = 16, H d = h, g = 1, F = 4: the paper's condition, in elements of one layer's forward.
NARROW = dict(
    hidden_size=16, num_attention_heads=2, num_query_groups=2, kv_channels=8, ffn_hidden_size=64, vocab_size=8
)


def rank_layer_forward(parallel: dict, lengths: list[int]) -> list[int]:
    """On a rank: elements that one layer more moves in the forward, of one sample of each length.

    Without the norm gains, 2h, which design.md leaves out.
    """
    axes, moved = None, []
    for length in lengths:
        totals = []
        for num_layers in (1, 2):
            case_ = case(**parallel, **NARROW, num_layers=num_layers)
            axes = axes or Axes.build(case_.parallel, torch.device("cpu"))
            axes.traffic.elements.clear()
            gpt = build_model(case_.config(), axes)
            local = axes.take_local(torch.zeros(1, length, dtype=torch.int64))
            with torch.no_grad():
                gpt(local, local, torch.ones(local.shape))
            totals.append(sum(n for label, n in axes.traffic.elements.items() if label != "small"))
        moved.append(totals[1] - totals[0])
    return moved


@pytest.mark.parametrize("ranks", [2, 4])
def test_tsp_moves_less_than_tp_from_8h_tokens_on(ranks):
    """TSP 2BTh + 16 h^2, TP 4BTh, both times (S-1)/S: equal where BT = 8h, whatever the ranks."""
    h = NARROW["hidden_size"]
    lengths = [8 * h - 2 * ranks, 8 * h, 8 * h + 2 * ranks]
    schemes = [dict(tsp=ranks), dict(tsp=ranks, tsp_layout="owner"), dict(tp=ranks)]
    if ranks > NARROW["num_attention_heads"]:
        schemes.pop()  # TP would cut a head; its formula alone
    tp = [4 * t * h * (ranks - 1) // ranks for t in lengths]
    tsp = [(2 * t * h + 16 * h * h) * (ranks - 1) // ranks for t in lengths]
    assert tsp[0] > tp[0] and tsp[1] == tp[1] and tsp[2] < tp[2]
    for scheme in schemes:
        for moved in run_distributed(rank_layer_forward, ranks, scheme, lengths):
            assert moved == (tp if "tp" in scheme else tsp), scheme
