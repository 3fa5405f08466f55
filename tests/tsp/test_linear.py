"""Products with columns in pieces equal those with the whole, and sums over buckets are fp32."""

import pytest
import torch
from torch import Tensor

from megatsp.tsp.linear import Total, products, project

N, H, WIDTHS = 7, 6, (3, 5, 1)


def integers(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Small integers, of which products and sums are exact in every dtype."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def pieces(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """[h, m] each, as transposed weights are: not contiguous."""
    return [integers(m, H, seed=m, dtype=dtype).t() for m in WIDTHS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_project_gives_the_products_side_by_side(dtype):
    rows, columns = integers(N, H, seed=0, dtype=dtype), pieces(dtype)
    expected = rows @ torch.cat(columns, 1)
    for found in (project(rows, columns), project(rows, [torch.cat(columns, 1)])):
        assert found.dtype == dtype and found.is_contiguous() and torch.equal(found, expected)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_fill_columns_wherever_they_lie(dtype, out_dtype):
    """The outs: h-major views of parts of tensors shaped [m, h] or [h, m], as gradients are."""
    a, b = integers(N, H, seed=1, dtype=dtype).t(), integers(N, sum(WIDTHS), seed=2, dtype=dtype)
    homes = [torch.full((10, H) if i < 2 else (H, 10), 99.0, dtype=out_dtype) for i in range(3)]
    outs = [
        (home if i == 2 else home.t())[:, 1 : 1 + m]
        for i, (home, m) in enumerate(zip(homes, WIDTHS, strict=True))
    ]
    products(outs, a, b)
    for out, expected in zip(outs, (a @ b).split(WIDTHS, 1), strict=True):
        assert torch.equal(out, expected.to(out_dtype))
    for home, m in zip(homes, WIDTHS, strict=True):  # and nothing beside them
        assert (home == 99).sum() >= H * (10 - m)


@pytest.mark.parametrize(
    ("num_buckets", "dtype", "expected"),
    [
        (1, torch.bfloat16, torch.bfloat16),
        (2, torch.bfloat16, torch.float32),
        (1, torch.float32, torch.float32),
        (3, torch.float32, torch.float32),
    ],
)
def test_a_total_is_wide_where_buckets_add_to_it(num_buckets, dtype, expected):
    total, exact = Total(num_buckets), torch.zeros(N, H)
    for bucket in range(num_buckets):
        a, b = integers(N, 4, seed=bucket, dtype=dtype), integers(4, H, seed=9 + bucket, dtype=dtype)
        total.add(a, b)
        exact += a.float() @ b.float()
    value = total.value((1, N, H))
    assert (value.shape, value.dtype) == ((1, N, H), expected)
    assert torch.equal(value[0], exact.to(expected))
    assert not value._is_view()  # autograd could not have it changed in place


def test_buckets_add_up_without_rounding_their_sum():
    """256 + 1 is 256 in bf16: a narrow sum would stay there."""
    total, one = Total(9), torch.ones(1, 1, dtype=torch.bfloat16)
    total.add(256 * one, one)
    for _ in range(8):
        total.add(one, one)
    assert total.value((1, 1)).item() == 264


@pytest.mark.parametrize("num_buckets", [1, 2])
@pytest.mark.parametrize("side_by_side", [False, True])
def test_transposed_columns(num_buckets, side_by_side):
    columns = [torch.cat(pieces(), 1)] if side_by_side else pieces()
    a, total = integers(N, sum(WIDTHS), seed=3), Total(num_buckets)
    for _ in range(num_buckets):
        total.add_transposed(a, columns)
    assert torch.equal(total.value((N, H)), num_buckets * (a @ torch.cat(pieces(), 1).t()))
