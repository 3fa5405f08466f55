"""Loss and every gradient of every way to spread the model equal the dense reference's."""

from itertools import cycle

import pytest
from parity import OLMO2, YARN, Case, case, check, fp32_bound, twice_dense_bound

RECOMPUTE = ("none", "selective", "full")
EXCHANGES = ("allgather", "ring", "ulysses", "hierarchical")
KV_HEADS = dict(allgather=2, ring=2, ulysses=8, hierarchical=2)  # Ulysses cuts them

# By ranks: the axes. FFN 107 and vocabulary 131 are uneven over tp, FSDP's shards of them too.
SCHEMES: dict[int, list[dict]] = {
    2: [
        *[dict(tp=2)] * 3,
        *(dict(cp=2, kv_exchange=exchange) for exchange in EXCHANGES),
        *(dict(cp=2, fsdp_over_cp=True, kv_exchange=exchange) for exchange in EXCHANGES[:3]),
        dict(dp_shard=2),
        dict(dp_replicate=2),
    ],
    4: [
        *[dict(tp=4)] * 3,
        *(dict(cp=4, kv_exchange=exchange) for exchange in EXCHANGES[:3]),
        dict(cp=4, fsdp_over_cp=True),
        *(dict(tp=2, cp=2, kv_exchange=exchange) for exchange in EXCHANGES[:3]),
        dict(tp=2, cp=2, kv_exchange="ring", fsdp_over_cp=True),
        *(dict(cp=2, tsp=2, kv_exchange=exchange) for exchange in EXCHANGES),
        dict(cp=2, tsp=2, kv_exchange="hierarchical", fsdp_over_cp=True),
        dict(cp=2, tsp=2, kv_exchange="hierarchical", tsp_layout="owner"),
        dict(dp_replicate=2, dp_shard=2),
    ],
    8: [
        dict(tp=2, cp=4, kv_exchange="ring"),
        dict(tp=4, cp=2, fsdp_over_cp=True),
        dict(cp=2, tsp=4, kv_exchange="hierarchical"),
        dict(cp=4, tsp=2, kv_exchange="hierarchical", fsdp_over_cp=True),
        dict(dp_replicate=2, tp=2, cp=2, fsdp_over_cp=True),
        dict(dp_shard=2, tp=2, cp=2),
    ],
}  # fmt: skip
AROUND = [dict(tp=2), dict(cp=2), dict(cp=2, fsdp_over_cp=True, kv_exchange="ring")]

MODELS = (
    dict(),
    dict(add_qkv_bias=True, untie_embeddings_and_output_weights=True),
    dict(qk_layernorm=True),
    dict(qk_layernorm=True, add_qkv_bias=True),
    dict(untie_embeddings_and_output_weights=True),
)
# Of attention, MLP and head; more micro-batches than one in the last.
COUNTS = (dict(), dict(mlp_buckets=3, head_buckets=3), dict(attention_buckets=2, micro_batches=2))


def cases(schemes: list[dict], dtype: str = "fp32") -> list[Case]:
    """Recompute settings, models and bucket counts are cycled through the schemes."""
    found = []
    for scheme, recompute, model, count in zip(
        schemes, cycle(RECOMPUTE), cycle(MODELS), cycle(COUNTS), strict=False
    ):
        groups = max(scheme.get("tp", 1), 2)
        if "kv_exchange" in scheme:
            groups = max(groups, KV_HEADS[scheme["kv_exchange"]])
        keys = dict(mlp_buckets=2 * scheme.get("tsp", 1), num_query_groups=groups) | model | scheme | count
        if groups // scheme.get("tp", 1) % 2:
            keys["attention_buckets"] = 1
        if scheme.get("tsp_layout") == "owner":
            keys["mlp_buckets"] = 2 * scheme["tsp"]
        found.append(case(recompute=recompute, dtype=dtype, **keys))
    return found


AFTER = dict(norm_position="after", qk_layernorm=True, rotary_scaling=YARN, no_rope_freq=2)
# What other models have; tp does not cut heads that are normalised together.
FAMILIES: dict[int, list[Case]] = {
    2: [
        case(recompute="none", cp=2, kv_exchange="ring", attention_buckets=2, **OLMO2),
        case(recompute="full", cp=2, fsdp_over_cp=True, kv_exchange="ulysses", attention_buckets=2, **OLMO2),
        case(recompute="selective", dp_shard=2, attention_buckets=4, micro_batches=2, **OLMO2),
        *(case(recompute=recompute, tp=2, attention_buckets=2, mlp_buckets=3, **AFTER)
          for recompute in RECOMPUTE),
        case(recompute="selective", cp=2, **AFTER),
    ],
    4: [
        case(2, "selective", cp=2, kv_exchange="hierarchical", attention_buckets=2, **OLMO2),
        case(2, "none", dp_shard=2, tsp_layout="owner", attention_buckets=2, **OLMO2),
        case(recompute="full", tp=2, cp=2, fsdp_over_cp=True, kv_exchange="ring", **AFTER),
    ],
    8: [case(4, "full", cp=2, kv_exchange="hierarchical", attention_buckets=2, **OLMO2)],
}  # fmt: skip


@pytest.mark.parametrize("world_size", SCHEMES)
def test_fp32(world_size):
    check(cases(SCHEMES[world_size]) + FAMILIES[world_size], world_size, fp32_bound)


def test_data_parallel_around():
    schemes = [{dp: 2} | inner for dp in ("dp_shard", "dp_replicate") for inner in AROUND]
    check(cases(schemes), 4, fp32_bound)


# FSDP's shards are uneven, and where h does not divide lie within dim 0's shards over tsp or tp.
UNEVEN: dict[int, list[dict]] = {
    2: [dict(dp_shard=2, hidden_size=41), dict(cp=2, fsdp_over_cp=True, hidden_size=41)],
    4: [
        dict(dp_shard=4, hidden_size=41),
        dict(tp=2, dp_shard=2, hidden_size=41),
        dict(tp=2, cp=2, fsdp_over_cp=True, hidden_size=41, add_qkv_bias=True, kv_channels=10),
        dict(tsp=2, dp_shard=2, hidden_size=42),
        dict(tsp=2, dp_shard=2, hidden_size=42, tsp_layout="owner"),
    ],
}


@pytest.mark.parametrize("world_size", UNEVEN)
def test_uneven_shards(world_size):
    check(cases(UNEVEN[world_size]), world_size, fp32_bound)


@pytest.mark.parametrize(
    ("world_size", "scheme"),
    [
        (2, dict(tp=2)),
        (2, dict(cp=2)),
        (2, dict(cp=2, kv_exchange="ring")),
        (2, dict(cp=2, kv_exchange="ulysses")),
        (2, dict(cp=2, fsdp_over_cp=True)),
        (2, dict(dp_shard=2)),
        (2, dict(dp_replicate=2)),
        (4, dict(tp=2, cp=2)),
        (4, dict(cp=2, tsp=2, kv_exchange="hierarchical")),
    ],
)
def test_bf16_error_is_at_most_twice_the_dense_one(world_size, scheme):
    found = [
        case(recompute=recompute, dtype="bf16", **scheme, **buckets)
        for recompute, buckets in zip(
            RECOMPUTE,
            (
                dict(mlp_buckets=scheme.get("tsp", 1), head_buckets=1),
                dict(attention_buckets=2, mlp_buckets=2),
                dict(mlp_buckets=2, head_buckets=3),
            ),
            strict=True,
        )
    ]
    check(found, world_size, twice_dense_bound)
