"""Measurements on gloo ranks: right and wrong data, a slow device, a slow link; and the command."""

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from distributed import run_distributed
from runs import RANK_VARIABLES, ROOT, TINY
from waiting import LIMIT_S

from megatsp import cli
from megatsp.cluster.profiles import Expected
from megatsp.comm import Comm
from megatsp.compose import compose
from megatsp.launcher.outcome import node_name
from megatsp.preflight import examine as examine_module
from megatsp.preflight import measure
from megatsp.preflight import rank as rank_module
from megatsp.preflight.command import parse
from megatsp.preflight.examine import Found, Judging, Kind, examine, expected_gb_s, hop_bytes
from megatsp.preflight.files import write_names
from megatsp.preflight.judge import Place, Sample, Verdict, judge_spanning
from megatsp.preflight.measure import Bench, Measured, measure_product, measure_transfer
from megatsp.preflight.presence import _name
from megatsp.preflight.rank import _needed
from megatsp.preflight.report import as_json, table
from megatsp.preflight.transfers import Transfer, bus_bytes
from megatsp.validate import validate

OPERATIONS = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "shift", "broadcast", "reduce")


class Steps:
    """A clock that is a step later each time it is read, so that every timing takes one step."""

    def __init__(self, step_s: float) -> None:
        self._times = itertools.count(0.0, step_s)

    def __call__(self) -> float:
        return next(self._times)


def transfer_results(dtype: str) -> list[list[Measured]]:
    """On a rank: each operation as it should be; with an element of what arrives changed; rotated; stale."""
    run, comm, repeats = measure._run, Comm(dist.group.WORLD), 2

    def changed(operation, given, comm):
        result = run(operation, given, comm)
        result.view(-1)[-1] += 1
        return result

    def rotated(operation, given, comm):
        return run(operation, given, comm).roll(64)

    def stale(operation, given, comm):
        """Does nothing the last time, so that there is what was there before."""
        calls.append(operation)
        if calls.count(operation) == 2 + 2 * repeats:  # warm, once; then timed and checked
            return kept[0]
        kept[:] = [run(operation, given, comm)]
        return kept[0]

    found, calls, kept = [], [], []
    for function in (run, changed, rotated, stale):
        measure._run = function
        bench = Bench(torch.device("cpu"), repeats, Steps(0.5))
        transfers = [Transfer("x", ("tsp",), operation, 1001, dtype) for operation in OPERATIONS]
        found.append([measure_transfer(transfer, comm, bench) for transfer in transfers])
    return found


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_operation_is_timed_and_checked(dtype):
    size = {"fp32": 4, "bf16": 2}[dtype]
    for rank, (good, *faulty) in enumerate(run_distributed(transfer_results, 3, dtype)):
        for operation, measured in zip(OPERATIONS, good, strict=True):
            assert measured.right and not measured.wrong_of, operation
            assert measured.value == pytest.approx(1e-9 * bus_bytes(operation, 1002 * size, 3) / 0.5)
            assert measured.seconds == pytest.approx(0.5)
        for results in faulty:
            right = {o for o, measured in zip(OPERATIONS, results, strict=True) if measured.right}
            assert right == ({"reduce"} if rank else set())  # which nobody else reads
        changed = dict(zip(OPERATIONS, faulty[0], strict=True))
        assert changed["all_gather"].wrong_of == changed["all_to_all"].wrong_of == (2,)
        assert changed["broadcast"].wrong_of == (0,) and changed["shift"].wrong_of == ()


@pytest.mark.parametrize("sums", [False, True])
def test_patterns_of_other_places_ranks_and_repetitions_differ(sums):
    def pattern(rank=0, number=1, start=0):
        return measure._pattern(1000, rank, number, sums, torch.device("cpu"), start)

    values = 4 if sums else 64
    assert pattern().unique().tolist() == list(range(values))
    assert torch.equal(pattern(start=10)[:990], pattern()[10:])
    others = [pattern(rank) for rank in (1, 2, 64 if not sums else 7)]
    others += [pattern(number=2), *(pattern().roll(shift) for shift in (1, 4, 16, 64, 256))]
    for other in others:
        assert (other != pattern()).float().mean() > 0.9 * (1 - 1 / values)


def on_a_quick_link() -> list[tuple[int, float]]:
    """On a rank: how often a transfer is repeated in a timing, and the seconds of one."""
    run, calls = measure._run, []
    clock_s = [0.0]

    def quick(operation, given, comm):
        calls.append(operation)
        clock_s[0] += 1e-3 if dist.get_rank() else 2e-3
        return run(operation, given, comm)

    measure._run = quick
    bench = Bench(torch.device("cpu"), 1, lambda: clock_s[0])
    measured = measure_transfer(Transfer("x", (), "all_reduce", 10, "fp32"), Comm(dist.group.WORLD), bench)
    return [(len(calls), measured.seconds, measured.right)]


def test_a_quick_transfer_is_repeated_for_one_timing_on_all_ranks_as_often():
    for rank, [(calls, seconds, right)] in enumerate(run_distributed(on_a_quick_link, 2)):
        assert calls == 1 + 1 + 5 + 1 and right  # warm, once, for 10 ms of the slower one, checked
        assert seconds == pytest.approx(1e-3 if rank else 2e-3)


def on_three_nodes(fault: str, excluding: bool = True, needed: int = 2, expected: Expected = Expected()):  # noqa: B008
    """On one of six ranks of three nodes: what is found with a fault, told as JSON and as a table."""
    rank = dist.get_rank()
    places = [Place(f"n{r // 2}", r % 2, "CPU rank") for r in range(6)]
    overrides = [
        *TINY,
        "launch.nproc=2",
        "parallel.tsp=2",
        "parallel.dp_shard=2",
        "trainer.global_batch_size=8",
    ]
    if needed == 3:
        overrides[-2:] = ["parallel.dp_shard=3", "trainer.global_batch_size=12"]
    config = validate(compose(overrides), 2 * needed)
    run, transferred = measure._run, examine_module.measure_transfer
    product = examine_module.measure_product

    def wrong(operation, given, comm):
        result = run(operation, given, comm)
        if operation == "all_gather":
            result.view(-1)[0] += 1
        return result

    def late(transfer, comm, bench):
        measured = transferred(transfer, comm, bench)
        is_hop = transfer.what.startswith("hop")
        return replace(measured, value=measured.value / 10) if is_hop else measured

    first_time = [True]

    def late_once(transfer, comm, bench):
        is_first = transfer.what.startswith("hop") and first_time and first_time.pop()
        return (late if is_first else transferred)(transfer, comm, bench)

    def raising(config, bench):
        raise RuntimeError("\nuncorrectable ECC error\nwhere it was")

    def blaming(samples, hops, expected, fraction):
        """Only now it is seen that n1 is bad."""
        bad = {"n1": ["late"]} if any("n1" in sample.nodes for sample in samples) else {}
        return Verdict(bad), Verdict()

    examine_module.judge_spanning = blaming if fault == "seen late" else judge_spanning

    def wrong_between(transfer, comm, bench):
        measured = transferred(transfer, comm, bench)
        return replace(measured, right=False) if "dp_shard" in transfer.axes else measured

    examine_module.measure_product = raising if fault == "broken device" and rank == 3 else product
    if fault == "burst" and rank == 3:
        examine_module.measure_transfer = late_once
    if fault == "wrong data" and rank == 0:
        measure._run = wrong
    if fault == "slow link" and rank == 3:
        examine_module.measure_transfer = late
    if fault == "wrong between" and rank == 1:
        examine_module.measure_transfer = wrong_between
    clock = Steps(5.0 if fault == "slow device" and rank == 3 else 1e-5 if fault == "brief" else 1.0)
    if fault == "brief" and rank == 3:
        clock = Steps(1e-4)
    judging = Judging(expected, 0.7, excluding, 60.0, 50.0)
    unfit = {"n1": ["GPU 1 cannot be used"]} if fault == "unfit" else None
    found = examine(config, places, needed, Bench(torch.device("cpu"), 1, clock), judging, unfit)
    return as_json(found), list(table(found, 2, "none"))


def faults() -> list:
    """On a rank: several examinations in turn."""
    before = measure._run, examine_module.measure_transfer, examine_module.measure_product
    results = []
    for given in (
        ("none",), ("slow device",), ("wrong data",), ("slow link",), ("slow device", False),
        ("slow device", True, 3), ("none", True, 2, Expected(within_node_gb_s=1.0, between_nodes_gb_s=1.0)),
        ("burst",), ("broken device",), ("wrong between",), ("brief",), ("unfit",),
        ("seen late",),
    ):  # fmt: skip
        measure._run, examine_module.measure_transfer, examine_module.measure_product = before
        results.append(on_three_nodes(*given))
    return results


def test_faults_are_named_and_spares_take_over():
    every_rank = run_distributed(faults, 6)
    assert all(results == every_rank[0] for results in every_rank)  # all come to the same choice
    reports, tables = zip(*every_rank[0], strict=True)
    good, slow, wrong, link, warned, few, below, burst, broken, unclear, brief, unfit, seen_late = reports
    lines, warned_lines = tables[0], tables[4]

    assert good["nodes"] == ["n0", "n1"] and good["spares"] == ["n2"]
    assert not good["bad"] and not good["warnings"]
    where = [m["where"] for m in good["measurements"]]
    assert where == sorted(where, key=["devices", "within nodes", "node to node", "between nodes"].index)
    assert {"devices", "within nodes", "node to node", "between nodes"} == set(where)
    between = [m for m in good["measurements"] if m["where"] == "between nodes"]
    assert between and all(
        [s["devices"] for s in m["measured"]] == [[["n0", 0], ["n1", 0]], [["n0", 1], ["n1", 1]]]
        for m in between
    )
    assert len(lines) == 2 + len(where) and "measured here, expected by launch.profile=none" in lines[0]

    assert slow["nodes"] == ["n0", "n2"] and slow["replaced"] == {"n1": "n2"} and not slow["spares"]
    assert list(slow["bad"]) == ["n1"]
    assert "CPU rank 1: GEMM fp32" in slow["bad"]["n1"][0] and "0.20 of the median" in slow["bad"]["n1"][0]
    after = [m for m in slow["measurements"] if m["where"] == "between nodes"]
    assert {place[0] for m in after for s in m["measured"] for place in s["devices"]} == {"n0", "n2"}

    assert wrong["nodes"] == ["n1", "n2"] and list(wrong["bad"]) == ["n0"]
    assert all(reason.endswith("wrong data") for reason in wrong["bad"]["n0"])
    assert link["nodes"] == ["n0", "n2"] and list(link["bad"]) == ["n1"]
    assert "CPU rank 1: hop to the next node" in link["bad"]["n1"][0]

    assert warned["nodes"] == ["n0", "n1"] and not warned["bad"]
    assert any(line.startswith("n1, CPU rank 1: GEMM") for line in warned["warnings"])
    assert any(line.startswith("warning: n1, CPU rank 1: GEMM") for line in warned_lines)
    assert not few["enough"] and few["nodes"] == [] and list(few["bad"]) == ["n1"]

    assert below["nodes"] == ["n0", "n1"] and not below["bad"]  # none of them is to blame
    assert below["warnings"] and all("most are below what is expected" in line for line in below["warnings"])
    assert burst["nodes"] == ["n0", "n1"] and not burst["warnings"]  # well when it is measured again

    for report in (broken, unfit):  # nobody measures with that node any more
        assert report["nodes"] == ["n0", "n2"] and report["replaced"] == {"n1": "n2"}
        others = [m for m in report["measurements"] if m["where"] != "devices"]
        assert {place[0] for m in others for s in m["measured"] for place in s["devices"]} == {"n0", "n2"}
    (reason,) = broken["bad"]["n1"]
    assert reason.startswith("CPU rank 1: GEMM fp32") and reason.endswith("]: uncorrectable ECC error")
    assert unfit["bad"] == {"n1": ["GPU 1 cannot be used"]}

    assert not unclear["enough"] and not unclear["bad"]
    assert unclear["unclear"] and all(text.endswith("over n0, n1: wrong data") for text in unclear["unclear"])

    assert seen_late["nodes"] == ["n0", "n2"]
    between = [m for m in seen_late["measurements"] if m["where"] == "between nodes"]
    nodes = [sorted({place[0] for s in m["measured"] for place in s["devices"]}) for m in between]
    assert nodes == sorted(nodes) and ["n0", "n1"] in nodes and nodes.count(["n0", "n2"]) == len(nodes) // 2

    transfers_in = [m["where"] != "devices" for m in brief["measurements"]]
    assert any(transfers_in) and list(brief["bad"]) == ["n1"]  # for its product alone
    assert all("GEMM" in reason for reason in brief["bad"]["n1"])
    assert any("hop to the next node" in warning for warning in brief["warnings"])


def test_a_profiles_figures_count_for_what_they_are_figures_of():
    known = Expected(within_node_gb_s=300, between_nodes_gb_s=40, ranks_per_node=8)
    gather, ring = (Transfer("x", ("tsp",), operation, 8, "bf16") for operation in ("all_gather", "shift"))
    node = [Place("n0", device) for device in range(8)]
    rail = [Place(f"n{i}", 3) for i in range(4)]

    def expected(transfer, places, per_node=8, known=known):
        return expected_gb_s(known, transfer, places, per_node)

    assert expected(gather, node) == 300 and expected(ring, node) == 0
    assert expected(gather, node[:4]) == 0 and expected(gather, node[:4], 4) == 0
    assert expected(gather, node[:4], 4, replace(known, ranks_per_node=0)) == 300
    assert expected(gather, rail) == expected(ring, rail[:2]) == 40
    assert expected(gather, [*node, *(Place("n1", device) for device in range(8))]) == 0


def test_hops_are_large_enough_to_say_something_of_a_network():
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert [hop_bytes(size, gpu) for size in (10, 2**26, 2**40)] == [2**24, 2**26, 2**28]
    assert hop_bytes(5000, cpu) == 5000


def test_a_product_that_is_wrong_is_seen(monkeypatch):
    config = validate(compose([*TINY, "launch.nproc=1"]), 1)
    bench = Bench(torch.device("cpu"), 2)
    good = measure_product(config, bench)
    assert good.right and good.value > 0 and good.seconds > 0
    mm, calls = torch.mm, []

    def once(a, b, out):
        """The last one of the timed products lacks a row."""
        calls.append(mm(a, b, out=out))
        out[3] = 0
        return out

    monkeypatch.setattr(torch, "mm", once)
    assert not measure_product(config, bench).right and len(calls) > 4


def places_of(*names: str) -> list[Place]:
    return [Place(name, 0) for name in names]


def test_which_nodes_are_a_jobs(tmp_path):
    config = compose(["launch.nproc=2", "launch.nodes=2"])
    two = places_of("a", "a", "b", "b")
    assert _needed(config, places_of("a"), None) == (1, 1)
    assert _needed(config, places_of("a", "a", "b", "b", "c", "c"), None) == (3, 2)
    for wrong in (places_of("a", "b", "a", "b"), places_of("a", "a", "b")):
        with pytest.raises(ValueError, match="not numbered node by node"):
            _needed(config, wrong, None)
    write_names(tmp_path / "nodes.txt", ["a", "b"])
    assert _needed(config, two, tmp_path) == (2, 2)
    assert _needed(config, [*two, *places_of("c", "c")], tmp_path) == (2, 2)
    with pytest.raises(ValueError, match=r"names a, where no rank is: .*present.txt"):
        _needed(config, places_of("c", "c", "b", "b"), tmp_path)
    with pytest.raises(ValueError, match="1 nodes of 2 ranks, but the job has launch.nodes=2"):
        _needed(config, places_of("a", "a"), tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fraction", "1.5"], "--fraction 1.5: must be in"),
        (["--repeats", "0"], "--repeats 0: must be at least 1"),
        (["--slow", "never"], "invalid choice"),
        (["--folder", "/nowhere"], "no nodes.txt in it"),
    ],
)
def test_options_that_are_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        parse(arguments)


def test_mistakes_are_told_before_ranks_start(monkeypatch, tmp_path, capsys):
    for name in RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cli.launcher, "launch_local", None)  # not reached
    assert cli.main(["preflight", "parallel.tsp=3", "launch.nproc=2"]) == 2
    assert "parallel: tsp 3" in capsys.readouterr().err
    (tmp_path / "nodes.txt").write_text("a\n")
    assert cli.main(["preflight", "--folder", str(tmp_path)]) == 2
    assert "--folder is for the ranks of a job" in capsys.readouterr().err


def environment(**more: str) -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k not in RANK_VARIABLES} | more


def test_the_command_alone():
    ran = subprocess.run(
        [sys.executable, "-m", "megatsp", "preflight", "--json", "--repeats", "1", *TINY, "launch.nproc=2",
         "parallel.tsp=2"],
        env=environment(), capture_output=True, text=True, timeout=LIMIT_S, cwd=ROOT,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    report = json.loads(ran.stdout)
    assert report["enough"] and len(report["nodes"]) == 1
    assert all(s["right"] and s["value"] > 0 for m in report["measurements"] for s in m["measured"])
    assert {m["expected"] for m in report["measurements"]} == {None}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_mistake_of_ranks_started_here_is_told_once():
    ran = subprocess.run(
        [sys.executable, "-m", "megatsp", "preflight", *TINY, "launch.nproc=2", "parallel.tsp=2",
         "launch.device=cuda"],
        env=environment(), capture_output=True, text=True, timeout=LIMIT_S, cwd=ROOT,
    )  # fmt: skip
    assert ran.returncode == 2
    assert ran.stderr.count("megatsp: error: ") == 1, ran.stderr
    assert f"launch.device=cuda, but {node_name()}: torch {torch.__version__} sees no GPU" in ran.stderr


def test_a_gpu_is_called_by_where_it_sits():
    assert _name(SimpleNamespace(pci_domain_id=0, pci_bus_id=0x9A, pci_device_id=0, uuid="u")) == "0000:9a:00"
    assert _name(SimpleNamespace(uuid="GPU-1-2")) == "GPU-1-2" and _name(SimpleNamespace()) == ""


def test_too_few_good_nodes_are_suspected_hardware(tmp_path, monkeypatch, capsys):
    write_names(tmp_path / "nodes.txt", ["n0"])
    sample = Sample("GEMM", "TFLOP/s", 1.0, (Place("n0", 3),), right=False)
    verdict = Verdict({"n0": ["GPU 3: GEMM: wrong data"]})
    found = Found(["n0"], 1, [Kind("GEMM", "devices", 0, 700.0, [sample])], verdict, None)
    monkeypatch.setattr(rank_module, "examine", lambda *given: found)
    for name, value in dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", SLURMD_NODENAME="n0").items():
        monkeypatch.setenv(name, value)
    join = partial(rank_module._join, store=dist.HashStore(), rank=0, world_size=1)
    monkeypatch.setattr(rank_module, "_join", join)
    try:
        assert rank_module.run(parse(["--folder", str(tmp_path), *TINY])) == 77
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    said = capsys.readouterr()
    assert "1 node is needed, but only 0 of the 1" in said.err
    assert "  n0: GPU 3: GEMM: wrong data\n" in said.err
    assert json.loads((tmp_path / "preflight.json").read_text())["bad"] == verdict.bad
    assert (tmp_path / "nodes.txt").read_text() == "n0\n"
