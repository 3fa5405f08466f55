"""Which kernels are chosen, what is refused; and the model on Triton's equals the dense reference."""

import subprocess
import sys
from dataclasses import fields, replace

import pytest
import torch
from parity import OLMO2, YARN, Case, case, check, fp32_bound, twice_dense_bound

from megatsp import kernels
from megatsp.compose import compose
from megatsp.kernels import choose_kernels, resolve
from megatsp.schema import KernelsConfig

CPU, GPU = torch.device("cpu"), torch.device("cuda")
KEYS = [item.name for item in fields(KernelsConfig)]
TRITON = KernelsConfig(**dict.fromkeys(KEYS, "triton"))


def test_auto_is_triton_on_a_gpu_and_torch_on_a_cpu(monkeypatch):
    monkeypatch.setattr(kernels, "chip_of", lambda device: "gfx942")
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
        choose_kernels(replace(KernelsConfig(), **{key: "triton"}), CPU, torch.float32)


@pytest.mark.parametrize("choice", [dict(attention="flash_attn"), dict(attention="aiter"), dict(norm="apex")])
def test_a_gpu_library_on_a_cpu_is_refused(choice):
    with pytest.raises(ValueError, match="computes on a GPU alone; or use kernels"):
        choose_kernels(KernelsConfig(**choice), CPU, torch.float32)


def triton(tsp: int = 1, *args: str, **keys: object) -> Case:
    """Head width 8, which the attention kernel takes; small, for the interpreter takes its time."""
    sizes = dict(num_layers=1, kv_channels=8, num_attention_heads=4, num_query_groups=2, attention_buckets=2)
    return replace(case(tsp, *args, **sizes | keys), kernels=TRITON, samples=1, length=24)


def test_one_rank():
    found = [triton(1, "none", head_buckets=1), triton(1, "full", qk_layernorm=True)]
    found.append(triton(1, "none", attention_buckets=1, rotary_scaling=YARN, **OLMO2))
    check(found, 1, fp32_bound)


def test_bf16_sums_of_several_buckets():
    """They are fp32: wider than what Triton's norm, its one kernel for bf16 here, adds them to."""
    found = replace(triton(1, "selective", "bf16"), kernels=KernelsConfig(norm="triton"), samples=2)
    check([found], 1, twice_dense_bound)


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
choose_kernels(KernelsConfig(), torch.device("cpu"), torch.float32)
try:
    choose_kernels(KernelsConfig(norm="triton"), torch.device("cpu"), torch.float32)
except ValueError as error:
    print(error)
from megatsp_kernels.attention import attention
from megatsp_kernels.linear_cross_entropy import linear_cross_entropy
from megatsp_kernels.rms_norm import rms_norm
from megatsp_kernels.rotary import rotate
from megatsp_kernels.streamed import matmul_pull
from megatsp_kernels.swiglu import swiglu
x, heads = torch.randn(4, 8), torch.randn(1, 2, 4, 8)
for call in (
    lambda: attention(heads, heads, heads, 1.0),
    lambda: linear_cross_entropy(x, x, torch.zeros(4, dtype=torch.int64)),
    lambda: rms_norm(x, x[0], 1e-5),
    lambda: rotate(heads, x[:, :4], x[:, :4]),
    lambda: matmul_pull(x, x.t()),
    lambda: swiglu(x),
):
    try:
        call()
    except ValueError as error:
        print(error)
"""


def test_without_triton_torch_computes_and_triton_is_refused():
    found = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    first, *others = found.stdout.splitlines()
    assert first.startswith("kernels.norm=triton: Triton kernels need triton: pip install")
    assert len(others) == 6 and all("Triton kernels need triton" in line for line in others)


@pytest.mark.parametrize("key", ["attention", "loss"])
def test_bf16_products_are_not_left_to_the_interpreter(key):
    with pytest.raises(ValueError, match=rf"kernels.{key}=triton: Triton's interpreter multiplies bf16"):
        choose_kernels(replace(KernelsConfig(), **{key: "triton"}), CPU, torch.bfloat16)


def test_auto_is_torch_on_a_gpu_that_has_no_tiles(monkeypatch):
    monkeypatch.setattr(kernels, "chip_of", lambda device: "sm_80")
    assert set(resolve(KernelsConfig(), GPU).values()) == {"torch"}


@pytest.mark.parametrize("width", [10, 264])
def test_a_head_that_the_kernel_does_not_take_is_refused_before_the_first_step(width):
    case_ = replace(case(1, kv_channels=width), kernels=TRITON)
    with pytest.raises(AssertionError, match=f"{width}: kernels.attention=triton takes multiples of 8"):
        check([case_], 1, fp32_bound)
