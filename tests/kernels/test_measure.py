"""Benchmarks are timed by turns, nothing that fails is dropped, and floors are those of the shapes."""

from itertools import pairwise

import pytest
import torch
from checks import DEVICE
from megatsp_kernels.benchmark import Benchmark, when_importable
from megatsp_kernels.common import Config
from megatsp_kernels.measure import DeviceLostError, measure
from megatsp_kernels.roofline import MACHINES, floor, intensity, machine_named
from megatsp_kernels.tune import NamedTable, contest, tables


def benchmark(make, flops=0, num_bytes=8, dtype=torch.bfloat16) -> Benchmark:
    return Benchmark("an op", dict(rows=2), dtype, flops, num_bytes, make)


def test_contestants_take_turns():
    order = []
    names = ["megatsp", "torch", "other"]
    made = benchmark(lambda device: {name: lambda name=name: order.append(name) for name in names})
    found = measure(made, torch.device("cpu"), repetitions=6)
    assert {name: len(times) for name, times in found.times_ms.items()} == dict.fromkeys(names, 6)
    timed = order[len(names) :]  # after one call each to warm up
    assert all(sorted(timed[i : i + 3]) == sorted(names) for i in range(0, 18, 3))
    assert [timed[i] for i in range(0, 18, 3)] == names * 2
    assert not found.failures


def test_a_rival_that_fails_or_is_missing_says_why():
    def fails():
        raise RuntimeError("no kernel image\nand more")

    def make(device):
        return {
            "megatsp": lambda: None,
            "broken": fails,
            "missing": when_importable("no_such_module", lambda module: module.run),
            "skipped": lambda: None,
        }

    found = measure(benchmark(make), torch.device("cpu"), 1, skip={"skipped": "not today"})
    assert [*found.times_ms] == ["megatsp"]
    assert found.failures == {
        "broken": "RuntimeError: no kernel image",
        "missing": "not importable: No module named 'no_such_module'",
        "skipped": "not today",
    }
    assert found.median_ms("broken") is None


def test_inputs_that_cannot_be_made_are_a_failure():
    def make(device):
        raise MemoryError("too large")

    assert measure(benchmark(make), torch.device("cpu"), 1).failures == {"inputs": "MemoryError: too large"}


def test_a_gpu_that_was_lost_is_not_measured_on(monkeypatch):
    def fails(*arguments):
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(torch.cuda, "synchronize", fails)
    with pytest.raises(DeviceLostError, match="megatsp: RuntimeError: an illegal memory access"):
        measure(benchmark(lambda device: {"megatsp": fails}), torch.device("cuda"), 1)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="events need a GPU")
def test_a_gpus_time_is_that_of_the_kernel():
    """A copy of 1 GiB at 1 to 8 TB/s takes 0.27 to 2.1 ms; launching it alone, microseconds."""
    source = torch.empty(2**30, dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    found = measure(benchmark(lambda device: {"megatsp": lambda: target.copy_(source)}), DEVICE, 5)
    middle = found.median_ms("megatsp")
    assert middle and 0.25 < middle < 2.2


def test_floors_follow_from_flops_and_bytes():
    mi300x, h200 = MACHINES
    product = benchmark(None, flops=1307 * 10**9, num_bytes=43 * 10**6)
    found = floor(product, mi300x)
    assert (found.least_us, found.bound) == (pytest.approx(1000), "compute")
    assert found.reachable_us == pytest.approx(1000 * 1307 / 708)
    assert intensity(product) == pytest.approx(30395, rel=1e-3)
    copy = floor(benchmark(None, num_bytes=4_300_000), h200)
    assert (copy.least_us, copy.reachable_us, copy.bound) == (pytest.approx(1), pytest.approx(1), "memory")
    # At an intensity between the two rates' knees only what is reached is bound by compute.
    between = floor(benchmark(None, flops=240 * 10**6, num_bytes=10**6), mi300x)
    assert between.bound == "compute" and between.least_us < between.reachable_us
    exact = floor(benchmark(None, flops=10**12, num_bytes=4_300_000, dtype=torch.float32), mi300x)
    assert (exact.least_us, exact.bound) == (pytest.approx(1), "memory (products not counted)")


@pytest.mark.parametrize(
    ("gpu", "name"), [("NVIDIA H200", "H200"), ("AMD Instinct MI300X OAM", "MI300X"), ("NVIDIA L4", None)]
)
def test_a_gpus_floors_are_found_by_its_name(gpu, name):
    found = machine_named(gpu)
    assert (found.name if found else None) == name


def test_every_config_is_a_contestant_and_the_table_is_left_as_it_was():
    first, second = Config(dict(ROWS=1)), Config(dict(ROWS=2), num_warps=8, amd=dict(waves_per_eu=2))
    table = {"gfx942": [first, second], "sm_90": [first]}
    used = []
    made = benchmark(lambda device: {"megatsp": lambda: used.append(table["gfx942"][0]), "torch": print})
    found = contest(made, NamedTable("TABLE", table), "gfx950")  # takes its vendor's entry
    assert found and found.name == "an op TABLE"
    times = measure(found, torch.device("cpu"), repetitions=2).times_ms
    assert [*times] == ["ROWS 1, 4 warps, 2 stages", "ROWS 2, 8 warps, 2 stages, waves_per_eu 2"]
    assert used == [first, second, first, second, second, first]
    assert table == {"gfx942": [first, second], "sm_90": [first]}
    assert contest(made, NamedTable("TABLE", table), "sm_90") is None  # one config: no choice


def test_tables_are_found_in_their_module():
    found = tables("swiglu")
    assert [named.name for named in found] == ["TABLE"]
    from megatsp_kernels.swiglu.triton import TABLE

    assert found[0].table is TABLE


def test_tables_inside_others_are_found(monkeypatch):
    from megatsp_kernels.swiglu import triton

    inner = {"sm_90": [Config({})]}
    monkeypatch.setattr(triton, "BY_WIDTH", {64: inner, 128: inner}, raising=False)
    assert [named.name for named in tables("swiglu")] == ["TABLE", "BY_WIDTH[64]"]
    assert all(a.table is not b.table for a, b in pairwise(tables("swiglu")))
