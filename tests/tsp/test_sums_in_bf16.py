"""What is computed in bf16 is added up in fp32: 301 ones are 301, not the 256 where bf16 stops counting."""

import torch
from torch import Tensor

from megatsp.comm import Comm
from megatsp.tsp.attention import HeadVectors, add_bias_gradients
from megatsp.tsp.buckets import Columns, Span, attention_part
from megatsp.tsp.embedding import embed
from megatsp.tsp.loss import TorchLoss

COUNT = 301  # odd: no bf16


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bfloat16)


def test_a_biases_gradient_is_a_sum_over_tokens():
    part = attention_part(query_heads=2, kv_heads=1, head_width=2, count=1)
    dvectors = HeadVectors(biases=(torch.zeros(4), torch.zeros(2), torch.zeros(2)))
    add_bias_gradients(dvectors, ones(1, COUNT, 8), part.buckets[0])
    assert dvectors.biases is not None
    assert all((bias == COUNT).all() for bias in dvectors.biases)


def test_a_row_of_the_embedding_sums_its_tokens():
    weight = torch.zeros(3, 4, requires_grad=True)
    out = embed(torch.ones(1, COUNT, dtype=torch.int64), weight, Comm(None), torch.bfloat16)
    out.backward(ones(1, COUNT, 4))
    assert torch.equal(weight.grad, COUNT * torch.tensor([[0.0], [1.0], [0.0]]).expand(3, 4))


def test_the_losses_of_logits_in_bf16_are_fp32():
    generator = torch.Generator().manual_seed(1)
    rows, columns = (
        torch.randn(5, 8, generator=generator).bfloat16(),
        torch.randn(8, 7, generator=generator),
    )
    targets, lse, target_logits = torch.arange(5), torch.full((5,), float("-inf")), torch.zeros(5)
    logits = TorchLoss().forward(
        rows, Columns([columns.bfloat16()]), targets, Span(0, 0, 7), lse, target_logits
    )
    assert logits is not None and logits.dtype == torch.bfloat16
    torch.testing.assert_close(lse, logits.double().logsumexp(-1).float(), rtol=1e-6, atol=0)
    assert torch.equal(target_logits, logits.float().diagonal())
