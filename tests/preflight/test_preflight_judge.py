"""From measurements to blame: outliers, expectations, ties, pairs, and what blames nobody."""

from dataclasses import replace

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


def test_two_slow_adapters_of_other_numbers_do_not_blame_the_node_between_them():
    speeds = {(0, 1): {3: 5}, (1, 2): {3: 5}, (2, 3): {5: 5}, (3, 4): {5: 5}}
    ring = []
    for a in range(8):
        b = (a + 1) % 8
        ring += hop(a, b, *(speeds.get((a, b), {}).get(device, 40) for device in range(8)))
    _, slow = judge_pairs(ring, 0, 0.7)
    assert slow.bad == {
        "n1": ["GPU 3: hop 5 GB/s, 0.12 of the median 40"], "n3": ["GPU 5: hop 5 GB/s, 0.12 of the median 40"]
    }  # fmt: skip


def test_two_nodes_blame_neither():
    assert judge_pairs(hop(0, 1, 5, 6), 0, 0.7) == (Verdict(), Verdict())
    _, slow = judge_pairs(hop(0, 1, 5, 6), 50, 0.7)
    assert slow.bad == {} and "most are below what is expected: the median is 6 GB/s" in slow.warnings[0]
    _, slow = judge_pairs(hop(0, 1, 40, 5, 41), 0, 0.7)
    assert slow.bad == {} and [line[:10] for line in slow.warnings] == ["n0, GPU 1:", "n1, GPU 1:"]
    wrong, _ = judge_pairs(hop(0, 1, 40, right=False), 0, 0.7)
    assert wrong.bad == {} and wrong.unclear == ["n0, GPU 0: hop: wrong data", "n1, GPU 0: hop: wrong data"]


def test_wrong_data_between_nodes():
    ring = [*hop(0, 1, 40, 40, right=False), *hop(1, 2, 40, 40, right=False), *hop(2, 0, 40, 40)]
    ring[0] = hop(0, 1, 40)[0]  # one of the two devices has a pair that is right
    wrong, slow = judge_pairs(ring, 0, 0.7)
    assert wrong == Verdict({"n1": ["GPU 1: hop: wrong data"]}) and slow == Verdict()
    assert judge_pairs([], 50, 0.7) == (Verdict(), Verdict())
    ring = [*hop(0, 1, 40), *hop(1, 2, 40, right=False), *hop(2, 3, 40), *hop(3, 0, 40)]
    assert judge_pairs(ring, 0, 0.7)[0].bad.keys() == {"n1", "n2"}  # both are well with others


def test_wrong_data_of_several_ranks_a_node_is_judged_by_the_node():
    places = tuple(Place(f"n{i // 2}", i % 2) for i in range(8))
    sample = Sample("gradients", "GB/s", 40, places, right=False)

    def blamed(wrong, places=places):
        return judge_spanning([replace(sample, wrong=tuple(wrong), places=places)], [], 0, 0.7)[0].bad

    everywhere = [(receiver, sender) for receiver in range(8) for sender in range(8)]
    across = [pair for pair in everywhere if pair[0] // 2 != pair[1] // 2]
    reason = "gradients over n0, n1, n2, n3: wrong data"
    assert blamed(pair for pair in across if 1 in (pair[0] // 2, pair[1] // 2)).keys() == {"n1"}
    assert blamed(pair for pair in across if pair[1] == 3) == {"n1": [f"GPU 1: {reason}"]}
    assert blamed([(2, 3)]) == {"n1": [f"GPUs 0-1: {reason}"]}  # it did not even leave the node
    assert blamed(across) == {} == blamed(everywhere)
    assert blamed([pair for pair in across if max(pair) < 4], places[:4]) == {}  # of two nodes


def test_a_slow_group_over_nodes_blames_none_but_names_the_slowest_pair():
    ring = [*hop(0, 1, 40), *hop(1, 2, 36), *hop(2, 3, 30), *hop(3, 0, 38)]
    wrong, slow = judge_spanning([group(40, 0, 1), group(12, 1, 2), group(41, 0, 3)], ring, 0, 0.7)
    assert wrong == Verdict() and slow.bad == {}
    assert slow.warnings == [
        "n1, n2: gradients 12 GB/s, 0.30 of the median 40; the slowest pair of them is that of n2"
    ]
    assert judge_spanning([], ring, 50, 0.7) == (Verdict(), Verdict())


def every(ranks: int, sender: int) -> tuple[tuple[int, int], ...]:
    return tuple((receiver, sender) for receiver in range(ranks) if receiver != sender)


@pytest.mark.parametrize(
    ("ranks", "wrong", "blamed"),
    [
        (4, every(4, 2), {"n2"}),  # a sender whom all find wrong
        (4, every(4, 2)[1:], {"n2"}),  # or most
        (4, every(4, 2) + every(4, 3), {"n2", "n3"}),
        (4, tuple((1, sender) for sender in (0, 2, 3)), {"n1"}),  # a receiver who finds all wrong
        (4, ((1, 2),), {"n1"}),  # what most others received well
        (4, (*every(4, 2), (1, 3)), {"n1", "n2"}),
        (3, ((1, 2),), set()),  # one says so, the other not
        (2, ((1, 0),), set()),
        # A ring's link from 1 to 2 spoils what passes: both ends are as likely.
        (4, ((2, 1), (3, 1), (0, 1), (2, 0), (3, 0), (2, 3)), set()),
        (4, (), set()),  # of sums nobody knows
    ],
)
def test_wrong_data_in_a_group_over_nodes_blames_who_explains_it(ranks, wrong, blamed):
    sample = replace(group(40, *range(ranks), right=False), wrong=wrong)
    verdict, slow = judge_spanning([sample, group(40, 5, 6)], [], 0, 0.7)
    nodes = ", ".join(f"n{i}" for i in range(ranks))
    reason = f"gradients over {nodes}: wrong data"
    assert verdict.bad == {node: [f"GPU 0: {reason}"] for node in sorted(blamed)} and slow == Verdict()
    assert verdict.unclear == ([] if blamed else [reason])


def test_a_device_is_named_by_what_it_is_called_for_good():
    sample = Sample("GEMM", "TFLOP/s", 1, (Place("n0", 5, id="0000:9a:00"),), right=False)
    wrong, _ = judge_nodes([sample], 0, 0.7)
    assert wrong.bad == {"n0": ["GPU 5 (0000:9a:00): GEMM: wrong data"]}


def test_a_verdict_as_warnings():
    verdict = Verdict({"n1": ["GPU 0: slow", "GPU 1: slow"]}, ["most are slow"])
    assert verdict.as_warnings() == Verdict({}, ["n1, GPU 0: slow", "n1, GPU 1: slow", "most are slow"])
    verdict.add(Verdict({"n1": ["GPU 0: slow", "wrong data"], "n2": ["x"]}, ["more"]))
    assert verdict.bad == {"n1": ["GPU 0: slow", "GPU 1: slow", "wrong data"], "n2": ["x"]}
    assert verdict.warnings == ["most are slow", "more"]
