"""Attention over one block of keys by torch's own flash attention.

Both directions take and give the log-sum-exp, so that blocks of keys which arrive
one after another merge exactly: the forward's partial outputs by their log-sum-exp,
the backward by handing every block the output and log-sum-exp of the WHOLE row.
"""

import torch
from torch import Tensor

_aten = torch.ops.aten


def _check(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> None:
    if q.dim() != 4 or k.shape != v.shape or q.shape[1] % k.shape[1] or q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"attention takes q [B, H, Tq, d] and k, v [B, K, Tk, d] with K dividing H; "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if causal and q.shape[2] != k.shape[2]:
        raise ValueError(f"causal attention needs as many queries as keys; got {q.shape[2]} and {k.shape[2]}")
    if q.is_cuda and q.dtype == torch.float32:
        raise ValueError(
            "flash attention on a GPU computes in bf16 or fp16, not fp32: set trainer.dtype=bf16"
        )


def attention_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """softmax(q k^T scale) v over one block of keys, never holding a score matrix.

    Args:
        q: [B, H, Tq, d]; k, v: [B, K, Tk, d] with K dividing H, unexpanded.
        causal: query i sees keys 0..i (needs Tq = Tk); otherwise all of them.
    Returns:
        output [B, H, Tq, d] in q's dtype and log-sum-exp [B, H, Tq] in fp32 (natural logarithm).
    Raises:
        ValueError: on shapes that do not fit, or fp32 on a GPU.
    Source: Dao et al., FlashAttention-2, arXiv:2307.08691, algorithm 1.
    """
    _check(q, k, v, causal)
    if q.is_cuda:
        return _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)[:2]
    return _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)


def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one block of keys, given the output and log-sum-exp of the whole row.

    Shapes as in attention_forward; dout and out: [B, H, Tq, d]. Returns dq, dk, dv in q's dtype.
    """
    _check(q, k, v, causal)
    lse = lse.contiguous()  # the GPU kernel reads it by pointer, whatever its strides
    if q.is_cuda:
        no_philox = torch.zeros(2, dtype=torch.uint64, device=q.device)
        return _aten._scaled_dot_product_flash_attention_backward(
            dout, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, causal, no_philox, no_philox,
            scale=scale,
        )  # fmt: skip
    return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, lse, 0.0, causal, scale=scale
    )
