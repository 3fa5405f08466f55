"""Where groups lie on nodes: what is refused, what is warned of, how it is shown."""

import re
from pathlib import Path

import matplotlib.image
import pytest

from megatsp.cluster.draw import draw_mesh, mesh_text
from megatsp.cluster.mesh import groups, place, placement_errors, placement_warnings
from megatsp.schema import AXES


def sizes(**given: int) -> dict[str, int]:
    assert given.keys() <= set(AXES)
    return {axis: given.get(axis, 1) for axis in AXES}


@pytest.mark.parametrize(
    ("given", "node"),
    [
        (sizes(tsp=8), 8),
        (sizes(tsp=4, dp_shard=4), 8),
        (sizes(tsp=8, cp=2, dp_shard=64), 8),
        (sizes(tp=2, cp=2, dp_shard=4), 8),
        (sizes(tsp=3, dp_shard=2), 8),  # part of one node
        (sizes(tsp=6), 8),
        (sizes(tsp=3, dp_shard=4), 6),
        (sizes(dp_shard=5), 1),
    ],
)
def test_meshes_that_fit_their_nodes(given: dict[str, int], node: int) -> None:
    assert placement_errors(given, node) == []
    assert place("tsp", given, node).nodes == place("tp", given, node).nodes == 1


@pytest.mark.parametrize(
    ("given", "node", "messages"),
    [
        (sizes(tsp=16), 8, ["parallel.tsp=16: a group must lie inside a node.*tsp=1 or 2 or 4 or 8"]),
        (sizes(tsp=3, dp_shard=8), 8, ["parallel.tsp=3: .* 3 ranks do not divide the 8 of one"]),
        (sizes(tp=16, cp=2), 8, ["parallel.tp=16: .*use parallel.tp=1 or 2 or 4 or 8"]),
        (sizes(tsp=8, tp=2), 8, ["parallel.tsp=8 x parallel.tp=2: .*use parallel.tsp=1 or 2 or 4, and"]),
        (sizes(tsp=4, dp_shard=3), 8, ["12 ranks, which do not fill whole nodes of 8.* a multiple of 8"]),
        (sizes(tsp=9), 8, ["do not fill whole nodes", "parallel.tsp=9"]),
    ],
)  # fmt: skip
def test_meshes_that_do_not(given: dict[str, int], node: int, messages: list[str]) -> None:
    errors = placement_errors(given, node)

    assert len(errors) == len(messages)
    for error, message in zip(errors, messages, strict=True):
        assert re.search(message, error), error


def test_a_group_that_changes_rails_is_warned_of() -> None:
    uneven = sizes(dp_shard=2, cp=3, tsp=4)

    (dp, cp) = placement_warnings(uneven, 8)

    assert "parallel.dp_shard=2" in dp and "parallel.cp=3" in cp
    assert list(groups("dp_shard", uneven)[0]) == [0, 12]  # GPU 0 of node 0, GPU 4 of node 1
    assert not placement_warnings(sizes(dp_shard=3, cp=2, tsp=4), 8)


def test_text_of_two_nodes() -> None:
    assert mesh_text(sizes(tsp=4, dp_shard=4), 8).splitlines() == [
        "16 ranks on 2 nodes of 8: dp_shard 4 x tsp 4; each GPU: rank (dp_shard, tsp)",
        "  node 0  0 (0,0)   1 (0,1)   2 (0,2)   3 (0,3)   4 (1,0)   5 (1,1)   6 (1,2)   7 (1,3)",
        "  node 1  8 (2,0)   9 (2,1)   10 (2,2)  11 (2,3)  12 (3,0)  13 (3,1)  14 (3,2)  15 (3,3)",
        "",
        "axis      ranks  groups  where",
        "dp_shard  4      4       across 2 nodes, on the same rails of each  "
        "0 4 8 12; 1 5 9 13; ...; 3 7 11 15",
        "tsp       4      4       inside a node                              0-3; 4-7; ...; 12-15",
    ]


def test_text_of_128_nodes_stays_short() -> None:
    lines = mesh_text(sizes(tsp=8, cp=2, dp_shard=64), 8).splitlines()

    assert len(lines) < 15 and max(map(len, lines)) < 150
    assert "  ... 124 more nodes ..." in lines
    assert any(
        line.startswith("  node 127  1016 (63,1,0)") and line.endswith("1023 (63,1,7)") for line in lines
    )


def test_text_of_one_rank_and_of_nodes_with_many() -> None:
    assert mesh_text(sizes(), 1).splitlines()[:2] == [
        "1 rank on 1 node: tsp 1; each GPU: rank (tsp)",
        "  node 0  0 (0)",
    ]
    lines = mesh_text(sizes(dp_shard=12), 12).splitlines()
    assert lines[1].split()[:3] == ["node", "0", "0"] and lines[2].split()[0] == "8"


def test_rails_that_do_not_meet_are_said() -> None:
    assert "across 2 nodes, from rail to rail" in mesh_text(sizes(dp_shard=2, cp=3, tsp=4), 8)


@pytest.mark.parametrize(
    ("given", "node", "rows"),
    [
        (sizes(tsp=8), 8, 1),
        (sizes(tsp=4, dp_shard=4), 8, 2),
        (sizes(tsp=8, cp=2, dp_shard=64), 8, 5),
        (sizes(dp_shard=24), 12, 4),
    ],
)
def test_pictures_grow_with_what_they_show(
    given: dict[str, int], node: int, rows: int, tmp_path: Path
) -> None:
    draw_mesh(given, node, tmp_path / "mesh.png")

    pixels = matplotlib.image.imread(tmp_path / "mesh.png")
    assert 90 * rows < len(pixels) < 320 + 150 * rows
    colours = {tuple(pixel) for line in pixels[::9] for pixel in line[::9]}
    assert len(colours) > 3


def test_a_picture_needs_a_folder(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"cannot write .*absent/mesh\.png: No such file.*folder that exists"
    ):
        draw_mesh(sizes(tsp=8), 8, tmp_path / "absent" / "mesh.png")
