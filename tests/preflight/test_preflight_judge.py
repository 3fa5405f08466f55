"""From measurements to blame: outliers, expectations, ties, pairs, and what blames nobody."""

import pytest

from megatsp.preflight.decide import choose
from megatsp.preflight.judge import Place, Sample, Verdict, judge_nodes, judge_pairs, judge_spanning


def gemm(*speeds: float, per_node: int = 2, wrong: tuple[int, ...] = ()) -> list[Sample]:
    """One speed a device, node by node."""
    return [
        Sample("GEMM", "TFLOP/s", speed, (Place(f"n{i // per_node}", i % per_node),), i not in wrong)
        for i, speed in enumerate(speeds)
    ]


def hop(a: int, b: int, *speeds: float, right: bool = True) -> list[Sample]:
    """Of the devices of two nodes."""
    return [
        Sample("hop", "GB/s", speed, (Place(f"n{a}", device), Place(f"n{b}", device)), right)
        for device, speed in enumerate(speeds)
    ]


def group(speed: float, *nodes: int, right: bool = True) -> Sample:
    return Sample("gradients", "GB/s", speed, tuple(Place(f"n{node}", 0) for node in nodes), right)


def test_a_slow_device_is_named_with_its_node():
    wrong, slow = judge_nodes(gemm(655, 650, 660, 402, 655, 640), 0, 0.7)
    assert wrong == Verdict()
    assert slow == Verdict({"n1": ["GPU 1: GEMM 402 TFLOP/s, 0.61 of the median 655"]})


def test_two_bad_nodes_and_the_spares_in_their_places():
    _, slow = judge_nodes(gemm(650, 650, 300, 650, 650, 650, 400, 100, 650, 650), 0, 0.7)
    assert {node: len(reasons) for node, reasons in slow.bad.items()} == {"n1": 1, "n3": 2}
    names = [f"n{i}" for i in range(5)]
    choice = choose(names, slow.bad, 3)
    assert choice.chosen == ["n0", "n2", "n4"] and choice.replaced == [("n1", "n4")]
    assert choose(names, slow.bad, 4) is None


@pytest.mark.parametrize(("speed", "blamed"), [(489, True), (490, False)])
def test_the_expected_speed_counts_where_it_is_known(speed, blamed):
    _, slow = judge_nodes(gemm(650, 650, 640, speed), 700, 0.7)
    assert list(slow.bad) == ["n1"] * blamed and not slow.warnings
    if blamed:
        assert slow.bad["n1"] == ["GPU 1: GEMM 489 TFLOP/s, 0.70 of the expected 700"]


def test_all_below_expectation_blames_no_node_but_the_slowest_still():
    _, slow = judge_nodes(gemm(300, 310, 305, 300), 700, 0.7)
    assert slow.bad == {}
    (warning,) = slow.warnings
    assert "most are below what is expected: the median is 305 TFLOP/s, 0.44 of 700" in warning
    _, slow = judge_nodes(gemm(300, 310, 305, 100), 700, 0.7)
    assert slow.bad == {"n1": ["GPU 1: GEMM 100 TFLOP/s, 0.33 of the median 305"]} and slow.warnings


def test_ties():
    """Of two the faster one is the measure; equal ones are none of them slow."""
    assert judge_nodes(gemm(600, 300, per_node=1), 0, 0.7)[1].bad.keys() == {"n1"}
    assert judge_nodes(gemm(300, 600, 600, 300, per_node=1), 0, 0.7)[1].bad.keys() == {"n0", "n3"}
    assert judge_nodes(gemm(300, 300, per_node=1), 0, 0.7)[1] == Verdict()
    assert judge_nodes([], 700, 0.7) == (Verdict(), Verdict())


def test_groups_of_a_node():
    places = tuple(Place("n0", device) for device in (0, 1, 2, 3))
    others = tuple(Place("n1", device) for device in (0, 2))
    samples = [Sample("bucket", "GB/s", 300, places), Sample("bucket", "GB/s", 100, others, right=False)]
    wrong, slow = judge_nodes(samples, 0, 0.7)
    assert slow.bad == {"n1": ["GPUs 0, 2: bucket 100 GB/s, 0.33 of the median 300"]}
    assert wrong.bad == {"n1": ["GPUs 0, 2: bucket: wrong data"]}
    assert judge_nodes([Sample("bucket", "GB/s", 1, places, False)], 0, 0.7)[0].bad == {
        "n0": ["GPUs 0-3: bucket: wrong data"]
    }


def test_wrong_data_counts_at_any_speed():
    wrong, slow = judge_nodes(gemm(650, 650, 650, 650, wrong=(2,)), 0, 0.7)
    assert wrong.bad == {"n1": ["GPU 0: GEMM: wrong data"]} and slow == Verdict()


def test_a_node_is_judged_by_the_best_of_its_pairs():
    """The neighbours of a slow node have one slow pair each, and a good one."""
    ring = [*hop(0, 1, 40, 5), *hop(1, 2, 40, 6), *hop(2, 3, 40, 39), *hop(3, 0, 41, 40)]
    wrong, slow = judge_pairs(ring, 0, 0.7)
    assert wrong == Verdict()
    assert slow.bad == {"n1": ["GPU 1: hop 6 GB/s, 0.15 of the median 40"]}


def test_two_slow_neighbours():
    ring = [*hop(0, 1, 5), *hop(1, 2, 5), *hop(2, 3, 5), *hop(3, 0, 40)]
    assert judge_pairs(ring, 0, 0.7)[1].bad.keys() == {"n1", "n2"}


def test_two_nodes_tell_a_slow_link_only_from_what_is_expected():
    assert judge_pairs(hop(0, 1, 5, 6), 0, 0.7) == (Verdict(), Verdict())
    _, slow = judge_pairs(hop(0, 1, 5, 6), 50, 0.7)
    assert slow.bad == {} and "most are below what is expected: the median is 5 GB/s" in slow.warnings[0]


def test_wrong_data_between_nodes():
    ring = [*hop(0, 1, 40, 40, right=False), *hop(1, 2, 40, 40, right=False), *hop(2, 0, 40, 40)]
    ring[0] = hop(0, 1, 40)[0]  # one of the two devices is right: the pair is not
    wrong, slow = judge_pairs(ring, 0, 0.7)
    assert wrong.bad == {"n1": ["GPU 1: hop: wrong data", "GPU 0: hop: wrong data"]} and slow == Verdict()
    assert judge_pairs(hop(0, 1, 40, right=False), 0, 0.7)[0].bad.keys() == {"n0", "n1"}
    assert judge_pairs([], 50, 0.7) == (Verdict(), Verdict())


def test_a_slow_group_over_nodes_blames_none_but_names_the_slowest_pair():
    ring = [*hop(0, 1, 40), *hop(1, 2, 36), *hop(2, 3, 30), *hop(3, 0, 38)]
    wrong, slow = judge_spanning([group(40, 0, 1), group(12, 1, 2), group(41, 0, 3)], ring, 0, 0.7)
    assert wrong == Verdict() and slow.bad == {}
    assert slow.warnings == [
        "n1, n2: gradients 12 GB/s, 0.30 of the median 40; the slowest pair of them is that of n2"
    ]
    wrong, _ = judge_spanning([group(40, 0, 1, right=False), group(40, 2, 3)], ring, 0, 0.7)
    assert wrong.bad.keys() == {"n0", "n1"}
    assert judge_spanning([], ring, 50, 0.7) == (Verdict(), Verdict())


def test_a_verdict_as_warnings():
    verdict = Verdict({"n1": ["GPU 0: slow", "GPU 1: slow"]}, ["most are slow"])
    assert verdict.as_warnings() == Verdict({}, ["n1, GPU 0: slow", "n1, GPU 1: slow", "most are slow"])
    verdict.add(Verdict({"n1": ["GPU 0: slow", "wrong data"], "n2": ["x"]}, ["more"]))
    assert verdict.bad == {"n1": ["GPU 0: slow", "GPU 1: slow", "wrong data"], "n2": ["x"]}
    assert verdict.warnings == ["most are slow", "more"]
