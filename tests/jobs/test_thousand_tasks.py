"""A job of 1,024 tasks on 128 nodes of a real Slurm: they meet, and each stands where `Axes` says.

With 128 nodes it is slow: `pytest -m slow`; the suite runs it with 16.

The job is `megatsp launch slurm preflight` with launch.preflight=quick: its tasks answer the roll call, which
loads no torch, and end. What `Axes` says is asked in this process, which needs no ranks for it.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from runs import overrides
from slurm import cluster
from waiting import LIMIT_S

from megatsp.axes import Axes
from megatsp.bench.memory import fake_group
from megatsp.compose import compose
from megatsp.jobs.attempts import read_attempts
from megatsp.schema import AXES
from megatsp.validate import validate

GPUS = 8
MESH = (
    f"launch.nproc={GPUS}", "parallel.tsp=8", "parallel.dp_replicate=4", "trainer.global_batch_size=256",
    "launch.preflight=quick",
    "launch.slurm.port=30500",  # another cluster of this host may run a job of the same number
)  # fmt: skip


@pytest.mark.skipif(os.geteuid() != 0, reason="Slurm's daemons are started by root")
@pytest.mark.timeout(3 * LIMIT_S)
@pytest.mark.parametrize("nodes", [16, pytest.param(128, marks=pytest.mark.slow)])
def test_tasks_stand_where_axes_says(nodes: int, tmp_path: Path) -> None:
    arguments = overrides(tmp_path / "none", tmp_path, *MESH, f"launch.nodes={nodes}")
    with cluster(tmp_path / "cluster", nodes, GPUS) as slurm:
        job = slurm.submit("preflight", *arguments)
        assert slurm.finish(job) == "COMPLETED"
    folder = tmp_path / "run" / "slurm" / f"job_{job}"
    (attempt,) = read_attempts(folder)
    assert attempt.action == "done"
    names = (folder / "attempt_0" / "nodes.txt").read_text().split()
    assert sorted(names) == sorted(f"n{number}" for number in range(nodes))
    ranks = json.loads((folder / "attempt_0" / "roll_call.json").read_text())["ranks"]
    assert [one["rank"] for one in ranks] == list(range(nodes * GPUS))
    assert all(one["node"] == names[one["rank"] // GPUS] for one in ranks)
    assert all(one["local_rank"] == one["rank"] % GPUS for one in ranks)

    config = validate(compose(arguments), nodes * GPUS)
    with fake_group(nodes * GPUS, 0):
        mesh = Axes.build(config.parallel, torch.device("cpu")).mesh.mesh
    for one in ranks:
        at = tuple(one["coordinates"][axis] for axis in AXES)
        assert mesh[at].item() == one["rank"]
    others = [axis for axis in AXES if axis != "tsp"]
    homes: dict[tuple[int, ...], set[str]] = {}
    for one in ranks:
        group = tuple(one["coordinates"][axis] for axis in others)
        homes.setdefault(group, set()).add(one["node"])
    assert len(homes) == nodes and all(len(home) == 1 for home in homes.values())
