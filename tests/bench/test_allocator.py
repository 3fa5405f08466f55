"""What operators allocate inside themselves: counted on a CPU, and told by rules for fake tensors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megatsp.bench.allocator import CpuBytes, FakeCpuBytes

_aten = torch.ops.aten
BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def peaks(make: Callable[[], tuple[Tensor, ...]], use: Callable[..., Any]) -> tuple[int, int]:
    """The most that `use` of what is made has allocated: counted, and told by rules."""
    inputs = make()
    with CpuBytes() as real:
        use(*inputs)
    with FakeTensorMode():
        inputs = make()
        with FakeCpuBytes() as fake:
            use(*inputs)
    assert real.peak == fake.peak
    return real.allocated_peak, fake.allocated_peak


@pytest.mark.parametrize(
    ("dtypes", "use", "expected"),
    [
        ((FP32, FP32), torch.mul, 12000),
        ((BF16, FP32), torch.mul, 2000 + 4000 + 4000 + 4000),  # both inputs, the first converted, the product
        ((FP32, BF16), Tensor.add_, 4000 + 2000 + 4000),
        ((BF16, FP32), Tensor.add_, 2000 + 4000 + 4000 + 4000),  # the sum too, before it is converted back
        ((FP32, BF16), Tensor.copy_, 4000 + 2000),
        ((BF16,), lambda x: x * 2.5, 2000 + 2000),
        ((BF16,), lambda x: x.float(), 2000 + 4000),
    ],
)
def test_what_an_elementwise_operator_converts(dtypes, use, expected):
    counted, told = peaks(lambda: tuple(torch.ones(1000, dtype=dtype) for dtype in dtypes), use)
    # A scalar of a few bytes may be on the way.
    assert counted == pytest.approx(expected, abs=16) and told == pytest.approx(expected, abs=16)


def test_logsumexp_holds_the_exponentials():
    counted, told = peaks(lambda: (torch.ones(100, 1000),), lambda x: x.logsumexp(-1))
    assert told == pytest.approx(counted, rel=0.01) and counted > 2 * 400_000


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("tokens", [100, 500, 1024, 4096])
def test_what_flash_attention_allocates(dtype, tokens):
    """Two KV heads for four query heads, and queries as the model has them: [B, T, H, d] in memory."""
    if dtype == BF16 and tokens == 100 and not torch.cpu._is_amx_tile_supported():
        pytest.skip("without AMX oneDNN multiplies with scratch of its own, of up to 0.25 MB: not modelled")

    def make() -> tuple[Tensor, ...]:
        q, dout = (torch.ones(1, tokens, 4, 64, dtype=dtype).transpose(1, 2) for _ in range(2))
        k, v = (torch.ones(1, tokens, 2, 64, dtype=dtype).transpose(1, 2) for _ in range(2))
        return q, k, v, dout

    def forward(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> None:
        _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)

    def backward(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> None:
        lse = torch.zeros(1, 4, tokens)
        _aten._scaled_dot_product_flash_attention_for_cpu_backward(dout, q, k, v, q, lse, 0.0, True)

    for use in (forward, backward):
        counted, told = peaks(make, use)
        assert told == pytest.approx(counted, rel=0.1), use.__name__
