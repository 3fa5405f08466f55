"""No tensor larger than its bucket is gathered, and neither logits nor scores are ever whole.

Watched by dispatch on every rank through a forward and a backward. Sizes are chosen so that a
bucket of logits is the largest tensor that may exist: larger than any weight or gradient, and
smaller than one row block of scores, [T/D, T].
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from distributed import run_distributed
from megatsp_kernels.attention import sdpa
from megatsp_kernels.attention.reference import attention
from parity import Case, case
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatsp.axes import Axes
from megatsp.model.parallelize import build_model, parts
from megatsp.tsp.buckets import Part, width
from megatsp.tsp.partition import take_local

T, H, V = 256, 32, 768
BUCKETS = dict(attention_buckets=2, mlp_buckets=4, head_buckets=4)
SIZES = dict(
    hidden_size=H, num_attention_heads=4, num_query_groups=4, kv_channels=8, ffn_hidden_size=64,
    vocab_size=V, untie_embeddings_and_output_weights=True,
)  # fmt: skip


# Documents of 1, of many and of few tokens: every chunk begins within one.
FIRST = torch.tensor([0, 1, 140, 141, 250]).repeat_interleave(torch.tensor([1, 139, 1, 109, 6]))[None]


class Watch(TorchDispatchMode):
    """The largest tensor that any operation gave, and the sizes of those that collectives touched."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.travelled: list[torch.Size] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            self.travelled += [t.shape for t in tree_leaves((args, results)) if isinstance(t, Tensor)]
        else:
            sizes = [_local(t).numel() for t in tree_leaves(results) if isinstance(t, Tensor)]
            self.largest = max([self.largest, *sizes])
        return results


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@dataclass
class Seen:
    largest: int
    weights: int  # elements of the largest [h, R], of [R, h] or of a piece of it, that travelled


def seen(watch: Watch) -> Seen:
    """Only weights and their gradients travel as matrices; keys, values and embeddings have more dims."""
    return Seen(watch.largest, max(shape.numel() for shape in watch.travelled if len(shape) == 2))


def rank_seen(case_: Case, with_head: bool, plain_attention: bool = False, packed: bool = False) -> Seen:
    if plain_attention:
        sdpa.attention_forward = attention
    axes = Axes.build(case_.parallel, torch.device("cpu"))
    gpt = build_model(case_.config(), axes)
    ids = take_local(torch.arange(T)[None] % V, axes.tsp.rank, axes.tsp.size)
    with Watch() as watch:
        if with_head:
            gpt(ids, ids, torch.ones(ids.shape), FIRST if packed else None).sum().backward()
        else:
            gpt(ids).sum().backward()
    return seen(watch)


def whole(part: Part) -> int:
    return H * sum(map(width, part.buckets))


def largest_bucket(*of: Part) -> int:
    return H * max(width(bucket) for part in of for bucket in part.buckets)


def largest_logits(tsp: int) -> int:
    return T // tsp * -(-V // BUCKETS["head_buckets"])


def cases(tsp: int) -> list[Case]:
    return [case(tsp, recompute, tsp_layout=layout, kv_exchange=exchange, **BUCKETS, **SIZES)
            for layout, exchange, recompute in product(
                ("hidden", "owner"), ("allgather", "ring"), ("none", "full"))]  # fmt: skip


def rank_each(tsp: int, with_head: bool, packed: bool) -> list[Seen]:
    return [rank_seen(case_, with_head, packed=packed) for case_ in cases(tsp)]


def each(tsp: int, with_head: bool, packed: bool = False) -> list[tuple[Case, Seen]]:
    """What every rank saw of every case."""
    per_rank = run_distributed(rank_each, tsp, tsp, with_head, packed)
    return [pair for found in per_rank for pair in zip(cases(tsp), found, strict=True)]


@pytest.mark.parametrize("tsp", [2, 4])
def test_no_layer_is_ever_whole(tsp):
    for case_, found in each(tsp, with_head=False):
        attention_part, mlp_part, _ = parts(case_.model, case_.parallel)
        bound = largest_bucket(attention_part, mlp_part)
        assert bound < min(whole(attention_part), whole(mlp_part))
        assert found.weights <= bound, case_
        if case_.parallel.tsp_layout == "hidden":
            assert found.weights == bound  # so the watch sees them


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tsp", [2, 4])
def test_neither_head_nor_logits_nor_scores_nor_masks_are_ever_whole(tsp, packed):
    bound = largest_logits(tsp)
    assert bound < T // tsp * T and bound > V * H // tsp
    for case_, found in each(tsp, with_head=True, packed=packed):
        head = parts(case_.model, case_.parallel)[2]
        assert found.weights == largest_bucket(head) < whole(head), case_
        assert found.largest == bound, case_


@pytest.mark.parametrize(
    ("bucket_count", "exceeds"),
    [
        ("attention_buckets", lambda found: found.weights > H * 64),
        ("mlp_buckets", lambda found: found.weights > H * 64),
        ("head_buckets", lambda found: found.largest > largest_logits(2)),
    ],
)
def test_the_watch_sees_what_is_whole(bucket_count: str, exceeds: Callable[[Seen], bool]):
    """The control: with one bucket each of the bounds above is broken."""
    buckets = BUCKETS | {bucket_count: 1}
    only_head = bucket_count == "head_buckets"
    for found in run_distributed(rank_seen, 2, case(2, **buckets, **SIZES), only_head):
        assert exceeds(found)
    for found in run_distributed(rank_seen, 2, case(2, **BUCKETS, **SIZES), only_head):
        assert not exceeds(found)


def test_the_watch_sees_a_score_matrix():
    """The control: plain attention in the forward breaks the bound."""
    heads = SIZES["num_attention_heads"] // BUCKETS["attention_buckets"]
    for found in run_distributed(rank_seen, 2, case(2, **BUCKETS, **SIZES), True, True):
        assert found.largest >= heads * (T // 2) ** 2 > largest_logits(2)
