"""Which kernels are chosen, what is refused; and the model on Triton's equals the dense reference."""

import subprocess
import sys
from dataclasses import fields, replace

import pytest
import torch
from parity import Case, case, check, fp32_bound

from megatsp.compose import compose
from megatsp.kernels import choose_kernels, resolve
from megatsp.schema import KernelsConfig

CPU, GPU = torch.device("cpu"), torch.device("cuda")
KEYS = [item.name for item in fields(KernelsConfig)]
TRITON = KernelsConfig(**dict.fromkeys(KEYS, "triton"))


def test_auto_is_triton_on_a_gpu_and_torch_on_a_cpu():
    assert set(resolve(KernelsConfig(), GPU).values()) == {"triton"}
    assert set(resolve(KernelsConfig(), CPU).values()) == {"torch"}
    mixed = KernelsConfig(attention="torch", norm="triton")
    assert resolve(mixed, GPU)["attention"] == "torch" and resolve(mixed, CPU)["norm"] == "triton"


@pytest.mark.parametrize("group", ["auto", "triton", "torch"])
def test_a_group_sets_every_key_and_one_key_can_differ(group):
    assert compose([f"kernels={group}"]).kernels == KernelsConfig(**dict.fromkeys(KEYS, group))
    other = compose([f"kernels={group}", "kernels.attention=aiter"]).kernels
    assert other == KernelsConfig(**dict.fromkeys(KEYS, group) | {"attention": "aiter"})


@pytest.mark.parametrize("key", KEYS)
def test_triton_on_a_cpu_without_its_interpreter_is_refused(monkeypatch, key):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(
        ValueError, match=rf"kernels.{key}=triton: .*run on a GPU.*or use kernels.{key}=torch"
    ):
        choose_kernels(replace(KernelsConfig(), **{key: "triton"}), CPU)


@pytest.mark.parametrize("choice", [dict(attention="flash_attn"), dict(attention="aiter"), dict(norm="apex")])
def test_a_gpu_library_on_a_cpu_is_refused(choice):
    with pytest.raises(ValueError, match="computes on a GPU alone; or use kernels"):
        choose_kernels(KernelsConfig(**choice), CPU)


def triton(tsp: int = 1, *args: str, **keys: object) -> Case:
    """Head width 8, which the attention kernel takes; small, for the interpreter takes its time."""
    sizes = dict(num_layers=1, kv_channels=8, num_attention_heads=4, num_query_groups=2, attention_buckets=2)
    return replace(case(tsp, *args, **sizes | keys), kernels=TRITON, samples=1, length=24)


def test_one_rank():
    check([triton(1, "none", head_buckets=1), triton(1, "full", qk_layernorm=True)], 1, fp32_bound)


@pytest.mark.parametrize("exchange", ["allgather", "ring"])
def test_two_ranks(exchange):
    found = [
        triton(2, "selective", kv_exchange=exchange, qk_layernorm=True, add_qkv_bias=True),
        triton(2, "none", kv_exchange=exchange, tsp_layout="owner", untie_embeddings_and_output_weights=True),
    ]
    check(found, 2, fp32_bound)


def test_four_ranks():
    found = [
        triton(4, "full", num_query_groups=1, attention_buckets=1),
        triton(2, "none", cp=2, kv_exchange="hierarchical"),
        triton(1, "selective", tp=2, cp=2, kv_exchange="ulysses", num_query_groups=4, attention_buckets=1),
    ]
    check(found, 4, fp32_bound)


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # importing it fails
import torch
import megatsp.training.run
from megatsp.kernels import choose_kernels
from megatsp.schema import KernelsConfig
choose_kernels(KernelsConfig(), torch.device("cpu"))
try:
    choose_kernels(KernelsConfig(norm="triton"), torch.device("cpu"))
except ValueError as error:
    print(error)
"""


def test_without_triton_torch_computes_and_triton_is_refused():
    found = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("kernels.norm=triton: Triton kernels need triton: pip install")
