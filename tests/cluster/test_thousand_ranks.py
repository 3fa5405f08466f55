"""1,024 ranks on 128 nodes of 8, in one process: where they stand, what they read, what they save.

Nothing travels: the process group is torch's fake one, tensors are on the meta device.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from corpora import some_sizes, splits, write
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.tensor import DTensor

from megatsp.axes import Axes, axis_sizes
from megatsp.bench.memory import fake_group
from megatsp.checkpoint import staging
from megatsp.checkpoint.store import OPTIMIZER
from megatsp.ckpt.layout import boxes
from megatsp.ckpt.tensors import Box
from megatsp.cluster.mesh import coordinates, groups, place, placement_errors, placement_warnings
from megatsp.compose import override
from megatsp.data.loader import Share, next_draws, read_batch
from megatsp.model.parallelize import lay_out
from megatsp.schema import AXES, Config, ParallelConfig
from megatsp.training.optimizer import MOMENTS
from megatsp.validate import validate

WORLD, NODE = 1024, 8
CPU = torch.device("cpu")
T, BATCH = 64, 256
SOME = (0, 9, 519, 1023)  # ranks whose meshes are built as they build them

MESHES = [
    ["parallel.tsp=8"],
    ["parallel.tsp=8", "parallel.dp_replicate=4"],
    ["parallel.tsp=8", "parallel.cp=2"],
    ["parallel.tsp=4", "parallel.cp=4", "parallel.dp_replicate=2", "parallel.fsdp_over_cp=true"],
    ["parallel.tp=4", "parallel.cp=2"],
]
meshes = pytest.mark.parametrize("overrides", MESHES, ids=lambda texts: " ".join(t[9:] for t in texts))

# Of the shape of a real one, whose h is no multiple of the ranks that FSDP shards it over.
MODEL = [
    "model.num_layers=1", "model.hidden_size=1088", "model.ffn_hidden_size=2880", "model.vocab_size=5003",
    "model.num_attention_heads=16", "model.num_query_groups=4", "model.kv_channels=64",
]  # fmt: skip


def configured(overrides: list[str]) -> Config:
    steps = [f"trainer.seq_length={T}", f"trainer.global_batch_size={BATCH}", "trainer.micro_batch_size=1"]
    return validate(override(Config(), [*MODEL, *steps, *overrides]), WORLD)


def named_sizes(parallel: ParallelConfig) -> dict[str, int]:
    return dict(zip(AXES, axis_sizes(parallel), strict=True))


def stand_in(rank: int, parallel: ParallelConfig) -> Any:
    """What `Axes` reckons a rank's share of the data from, without its meshes, which take 60 ms a rank."""
    at = coordinates(rank, axis_sizes(parallel))
    sequence = SimpleNamespace(rank=at["cp"] * parallel.tsp + at["tsp"], size=parallel.cp * parallel.tsp)
    self = SimpleNamespace(sequence=sequence, tp=SimpleNamespace(rank=at["tp"], size=parallel.tp))
    self.take_local = partial(Axes.take_local, self)
    self.dp_rank = at["dp_replicate"] * parallel.dp_shard + at["dp_shard"]
    self.spans = partial(Axes.spans, self)
    return self


@meshes
def test_coordinates_and_groups_are_those_of_the_mesh(overrides: list[str]) -> None:
    parallel = configured(overrides).parallel
    sizes = named_sizes(parallel)
    with fake_group(WORLD, 0):
        mesh = Axes.build(parallel, CPU).mesh.mesh

    for rank in range(WORLD):
        at = coordinates(rank, axis_sizes(parallel))
        assert mesh[tuple(at[axis] for axis in AXES)] == rank
    for dim, axis in enumerate(AXES):
        expected = mesh.movedim(dim, -1).reshape(-1, sizes[axis]).tolist()
        assert [list(group) for group in groups(axis, sizes)] == expected


@meshes
def test_ranks_build_the_mesh_that_is_said_of_them(overrides: list[str]) -> None:
    parallel = configured(overrides).parallel
    sizes = named_sizes(parallel)
    for rank in SOME:
        with fake_group(WORLD, rank):
            axes = Axes.build(parallel, CPU)
            at = coordinates(rank, axis_sizes(parallel))
            assert axes.mesh.get_coordinate() == tuple(at[axis] for axis in AXES)
            for axis in AXES:
                (own,) = [group for group in groups(axis, sizes) if rank in group]
                assert dist.get_process_group_ranks(axes.mesh.get_group(axis)) == list(own)
            light = stand_in(rank, parallel)
            assert (axes.dp_rank, axes.spans(T)) == (light.dp_rank, light.spans(T))


@meshes
def test_groups_lie_in_nodes_and_keep_their_rails(overrides: list[str]) -> None:
    sizes = named_sizes(configured(overrides).parallel)

    assert placement_errors(sizes, NODE) == []
    assert placement_warnings(sizes, NODE) == []
    for axis in ("tsp", "tp"):
        assert all(group[0] // NODE == group[-1] // NODE for group in groups(axis, sizes))
        assert place(axis, sizes, NODE).nodes == 1
    assert max(place(axis, sizes, NODE).nodes for axis in ("dp_shard", "cp", "dp_replicate")) > 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write(folder / "a", some_sizes(400))
    write(folder / "b", some_sizes(90, seed=1))
    return folder


@pytest.mark.parametrize("overrides", [MESHES[1], *MESHES[3:]], ids=["tsp dp", "tsp cp", "tp cp"])
def test_ranks_read_each_position_of_a_batch_once_and_what_one_rank_reads(
    overrides: list[str], folder: Path
) -> None:
    parallel = configured(overrides).parallel
    blend = splits(["0.7", f"{folder}/a", "0.3", f"{folder}/b"], seq_length=T).train
    dp_size, cursor = parallel.dp_replicate * parallel.dp_shard, 0
    alone = Share(BATCH, BATCH, 0, 1, ((0, T),))
    shares = []
    for rank in range(WORLD):
        light = stand_in(rank, parallel)
        shares.append(Share(BATCH, 1, light.dp_rank, dp_size, light.spans(T)))
    for step in range(2):
        draws, following = next_draws(blend, cursor, BATCH)
        (whole,) = alone.micro_batches(draws)
        assert whole == blend.draw(step * BATCH, BATCH)
        ids, labels, mask, _ = read_batch(blend, whole)
        seen, readers = torch.zeros(BATCH, T, dtype=torch.int64), torch.zeros(BATCH, dtype=torch.int64)
        for share in shares:
            columns = torch.cat([torch.arange(*span) for span in share.spans])
            rows = torch.tensor(share.micro_batches(range(BATCH))).flatten()
            seen[rows[:, None], columns] += 1
            readers[rows] += 1
            own = read_batch(blend, share.micro_batches(draws)[step], share.spans)
            row = rows[step : step + 1]
            for given, expected in zip(own[:3], (ids, labels, mask), strict=True):
                assert torch.equal(given, expected[row][:, columns])
        assert torch.equal(seen, torch.ones_like(seen))
        assert torch.equal(readers, torch.full_like(readers, parallel.cp * parallel.tsp * parallel.tp))
        cursor = following


@pytest.fixture
def remembered(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Reckons a rank's place once for equal shapes, which moments have too: it takes 0.5 ms."""
    real, places = staging.compute_local_shape_and_global_offset, {}

    def place_of(shape: torch.Size, mesh: Any, placements: Any) -> Any:
        key = shape, mesh.get_coordinate(), placements
        if key not in places:
            places[key] = real(shape, mesh, placements)
        return places[key]

    monkeypatch.setattr(staging, "compute_local_shape_and_global_offset", place_of)
    return place_of


def trained(config: Config) -> dict[str, DTensor]:
    """What this rank's model and optimizer save, without data."""
    gpt = lay_out(config, Axes.build(config.parallel, CPU))
    weights = {name: parameter.detach() for name, parameter in gpt.named_parameters()}
    moments = {f"{OPTIMIZER}{m}.{name}": weight for m in MOMENTS for name, weight in weights.items()}
    return weights | moments


def planned(tensors: Mapping[str, torch.Tensor], rank: int) -> tuple[DefaultSavePlanner, SavePlan]:
    """What a rank plans to write, by the planner that dcp.save takes."""
    planner = DefaultSavePlanner()
    planner.set_up_planner(staging.Staging().view(tensors), is_coordinator=rank == 0)
    return planner, planner.create_local_plan()


def parts_of(plan: SavePlan) -> list[tuple[str, torch.Size, torch.Size]]:
    """(name, offsets, sizes) of each part in a plan."""
    return [
        (item.index.fqn, item.tensor_data.chunk.offsets, item.tensor_data.chunk.sizes) for item in plan.items
    ]


def times_written(shape: torch.Size, parts: list[tuple[torch.Size, torch.Size]]) -> torch.Tensor:
    """How often each element is in a part (offsets, sizes): one element for all that no part tells apart."""
    cuts = [
        sorted({0, shape[d], *(o[d] for o, _ in parts), *(o[d] + s[d] for o, s in parts)})
        for d in range(len(shape))
    ]
    count = torch.zeros([len(c) - 1 for c in cuts], dtype=torch.int64)
    for offsets, sizes in parts:
        within = [slice(c.index(o), c.index(o + s)) for c, o, s in zip(cuts, offsets, sizes, strict=True)]
        count[tuple(within)] += 1
    return count


def test_ranks_save_each_element_once_and_about_as_many(remembered: Any) -> None:
    config = configured(["parallel.tsp=8", "parallel.cp=2", "parallel.dp_replicate=2"])  # four have the same
    local, planners = [], []
    with fake_group(WORLD, 0):
        tensors = trained(config)
        meshes = {id(tensor.device_mesh): tensor.device_mesh for tensor in tensors.values()}
        for rank in range(WORLD):
            for mesh in meshes.values():  # all that differs between ranks
                mesh._coordinate_on_dim = tuple((mesh.mesh == rank).nonzero()[0].tolist())
            own = {}
            for name, tensor in tensors.items():
                sizes, _ = remembered(tensor.shape, tensor.device_mesh, tensor.placements)
                part = torch.empty(sizes, device="meta", dtype=tensor.dtype)
                own[name] = DTensor(part, tensor._spec, requires_grad=False)
            planner, plan = planned(own, rank)
            planners.append(planner)
            local.append(plan)
        plans, _ = planners[0].create_global_plan(local)
    for rank in SOME[1:]:  # as that rank itself plans it
        with fake_group(WORLD, rank):
            assert parts_of(planned(trained(config), rank)[1]) == parts_of(local[rank])

    for name in ("model.embed_tokens.weight", "model.layers.0.self_attn.o_proj.weight"):
        held = boxes(tensors[name], WORLD)  # what `megatsp ckpt plan` says that each rank holds
        for rank, plan in enumerate(local):
            for part, offsets, sizes in parts_of(plan):
                assert part != name or Box(tuple(offsets), tuple(sizes)) == held[rank]

    assert [len(plan.items) for plan in local] == [len(plan.items) for plan in plans], "planned twice"
    parts: dict[str, list] = {name: [] for name in tensors}
    for plan in plans:
        for name, offsets, sizes in parts_of(plan):
            parts[name].append((offsets, sizes))
    for name, tensor in tensors.items():
        times = times_written(tensor.shape, parts[name])
        assert torch.equal(times, torch.ones_like(times)), name
    written = [sum(4 * sizes.numel() for _, _, sizes in parts_of(plan)) for plan in plans]
    whole = sum(4 * tensor.numel() for tensor in tensors.values())
    assert sum(written) == whole
    assert max(written) <= 1.1 * whole / WORLD, (max(written), whole / WORLD)
