"""Every listed operation can be compiled and measured; a listed one that lacks a file is an error."""

import sys
from types import ModuleType

import pytest
from megatsp_kernels import registry
from megatsp_kernels.aot import TARGETS


@pytest.mark.parametrize("op", registry.OPS)
def test_every_operation_has_variants_and_benchmarks(op):
    for target in TARGETS:
        found = [variant for _, variant in registry.variants(target, [op])]
        assert found, target
        for variant in found:
            named = {*variant.signature, *variant.config.blocks, *variant.constants}
            assert named == {*variant.kernel.arg_names}, variant.label
            assert {*variant.aligned} <= {*variant.signature}, variant.label
    for smoke in (False, True):
        benchmarks = [benchmark for _, benchmark in registry.benchmarks(smoke, [op])]
        assert benchmarks
        assert all(b.bytes > 0 and b.flops >= 0 and b.shape for b in benchmarks)
        assert len({(b.name, str(b.shape)) for b in benchmarks}) == len(benchmarks)


def test_an_operation_that_lacks_a_file_is_an_error(monkeypatch):
    monkeypatch.setattr(registry, "OPS", ("swiglu", "nothing"))
    with pytest.raises(ImportError, match="megatsp_kernels.nothing"):
        list(registry.variants("gfx942"))
    with pytest.raises(ImportError, match="megatsp_kernels.nothing"):
        list(registry.benchmarks())


def test_a_file_without_its_function_is_an_error(monkeypatch):
    monkeypatch.setattr(registry, "OPS", ("hollow",))
    monkeypatch.setitem(sys.modules, "megatsp_kernels.hollow", ModuleType("megatsp_kernels.hollow"))
    empty = ModuleType("megatsp_kernels.hollow.bench")
    monkeypatch.setitem(sys.modules, "megatsp_kernels.hollow.bench", empty)
    with pytest.raises(ImportError, match=r"hollow/bench.py, listed in registry.OPS, has no `benchmarks`"):
        list(registry.benchmarks())


def test_an_unknown_operation_is_refused():
    with pytest.raises(ValueError, match="no operation swish, gelu: there are attention, "):
        list(registry.variants("gfx942", ["swish", "gelu"]))
