"""Which nodes a roll call leaves out, and which spare takes whose place."""

from dataclasses import replace

import pytest

from megatsp.preflight.decide import Answer, choose, judge_nodes, too_few
from megatsp.preflight.node_names import expand

FACTS = {
    "versions": {"python": "3.11.7", "torch": "2.13.0"},
    "driver": "6.10",
    "gpus": 2,
    "gpu_bytes": [192 << 30] * 2,
    "gpu_error": "",
}


def answers(num_nodes: int, ranks: int = 2) -> dict[int, Answer]:
    """Of nodes n0, n1, ... that are all well."""
    return {
        rank: Answer(
            rank, f"n{rank // ranks}", rank % ranks, f"boot{rank // ranks}", True,
            facts={} if rank % ranks else FACTS,
        )
        for rank in range(num_nodes * ranks)
    }  # fmt: skip


def reasons(found: dict[int, Answer], num_nodes: int, names=(), devices=True) -> dict[str, list[str]]:
    nodes = judge_nodes(list(found.values()), num_nodes, 2, names, devices)
    assert [node.index for node in nodes] == list(range(num_nodes))
    return {node.name: node.reasons for node in nodes if node.reasons}


def test_good_nodes():
    assert reasons(answers(3), 3) == {}


def test_ranks_that_did_not_answer():
    found = answers(3)
    del found[2], found[3], found[5]
    assert reasons(found, 3, ["n0", "node-b", "n2"]) == {
        "node-b": ["none of its ranks 2 to 3 has answered"],
        "n2": ["no answer from rank 5"],
    }
    assert list(reasons(found, 3)) == ["node 1 of the allocation", "n2"]


def test_ranks_that_are_numbered_otherwise():
    found = answers(2)
    found[1], found[2] = (
        replace(found[1], node="n1", local_rank=0),
        replace(found[2], node="n0", local_rank=1),
    )
    for text in reasons(found, 2).values():
        assert "--distribution=block" in text[0]


def test_one_node_that_is_counted_twice():
    found = answers(3)
    for rank in (4, 5):
        found[rank] = replace(found[rank], node="n0")
    assert reasons(found, 3) == {"n0": ["it has more ranks than one node's: 0 is there too"]}


def test_ranks_under_two_kernels():
    found = answers(2)
    found[3] = replace(found[3], boot_id="other")
    assert reasons(found, 2) == {"n1": ["its ranks do not run under one kernel"]}


def test_a_folder_that_is_not_shared():
    found = answers(2)
    found[3] = replace(found[3], sees_folder=False)
    assert reasons(found, 2) == {
        "n1": ["local rank 1 cannot read what rank 0 wrote to the folder: is it shared?"]
    }


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"versions": {"python": "3.11.7", "torch": "2.12.1"}}, "torch 2.12.1, but 2.13.0 on 2 of 3 nodes"),
        ({"versions": {"python": "3.11.7"}}, "torch none, but 2.13.0 on 2 of 3 nodes"),
        (
            {"versions": {**FACTS["versions"], "apex": "1"}},
            "apex 1, but none on 2 of 3 nodes",
        ),
        ({"driver": ""}, "driver none that is known, but 6.10 on 2 of 3 nodes"),
        ({"gpus": 1}, "1 GPUs for 2 ranks"),
        ({"gpus": 3}, "GPUs 3, but 2 on 2 of 3 nodes"),
        (
            {"gpu_bytes": [192 << 30, 96 << 30]},
            "memory of GPU 1: 96.0 GiB, but 192.0 GiB on 2 of 3 nodes",
        ),
        ({"gpu_error": "nvidia-smi: GPU is lost"}, "its GPUs do not answer: nvidia-smi: GPU is lost"),
    ],
)
def test_a_node_that_is_not_as_the_others(change, reason):
    found = answers(3)
    found[0] = replace(found[0], facts={**FACTS, **change})
    (name, texts), *others = reasons(found, 3).items()
    assert name == "n0" and reason in texts and not others


def test_of_two_versions_on_as_many_nodes_the_first_counts():
    found = answers(2)
    found[2] = replace(found[2], facts={**FACTS, "driver": "6.8"})
    assert reasons(found, 2) == {"n1": ["driver 6.8, but 6.10 on 1 of 2 nodes"]}


def test_no_gpus_are_a_reason_only_where_they_are_wanted():
    found = answers(1)
    found[0] = replace(found[0], facts={**FACTS, "gpus": 0, "gpu_bytes": []})
    assert reasons(found, 1, devices=False) == {}
    assert reasons(found, 1) == {"n0": ["0 GPUs for 2 ranks"]}


def test_clocks_are_held_against_most_nodes():
    found = answers(4)
    for rank in (2, 3, 4, 5, 6, 7):  # rank 0's own is late
        found[rank] = replace(found[rank], offset_s=60.0, error_s=0.1)
    assert reasons(found, 4) == {"n0": ["its clock is 60.0 s behind most nodes'"]}

    def notes_of(offset_s: float, error_s: float) -> list[list[str]]:
        found = answers(4)
        for rank in (2, 3):
            found[rank] = replace(found[rank], offset_s=offset_s, error_s=error_s)
        nodes = judge_nodes(list(found.values()), 4, 2, (), True)
        assert not any(node.reasons for node in nodes)
        return [node.notes for node in nodes]

    assert notes_of(2.0, 0.1) == [[], ["its clock is 2.0 s ahead of most nodes'"], [], []]
    assert notes_of(40.0, 39.8) == [[]] * 4  # the answer took so long that it may be right


def test_spares_take_the_places_of_bad_nodes_in_order():
    names = [f"n{i}" for i in range(6)]
    choice = choose(names, {"n1": ["x"], "n4": ["y"]}, 3)
    assert choice.chosen == ["n0", "n2", "n3"] and choice.spares == ["n5"]
    assert choice.replaced == [("n1", "n3")]
    choice = choose(names, {"n0": ["x"], "n2": ["x"]}, 4)
    assert choice.chosen == ["n1", "n3", "n4", "n5"] and choice.spares == []
    assert choice.replaced == [("n0", "n4"), ("n2", "n5")]
    assert choose(names, {}, 6).replaced == []


def test_too_few_good_nodes():
    bad = {"n1": ["no answer from rank 2", "driver 6.8"], "n2": ["x"]}
    assert choose(["n0", "n1", "n2"], bad, 2) is None
    text = too_few(["n0", "n1", "n2"], bad, 2)
    assert text.startswith("2 nodes are needed, but only 1 of the 3")
    assert "  n1: no answer from rank 2; driver 6.8\n  n2: x\n" in text and "launch.spare_nodes" in text


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", []),
        ("n1", ["n1"]),
        ("n[1-3,07],gpu-a", ["n1", "n2", "n3", "n07", "gpu-a"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
        ("r[1-2]n[1-2]", ["r1n1", "r1n2", "r2n1", "r2n2"]),
    ],
)
def test_names_of_nodes(text, names):
    assert expand(text) == names


@pytest.mark.parametrize("text", ["n[1-3", "n[3-1]", "n[a-b]"])
def test_names_that_are_none(text):
    with pytest.raises(ValueError, match=r"n\["):
        expand(text)
