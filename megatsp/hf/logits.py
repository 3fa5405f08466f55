"""Logits of the streamed model for short texts: to check it, not to train or generate with it."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from megatsp.axes import Axes
from megatsp.model.gpt import GPT
from megatsp.model.parallelize import reshard
from megatsp.tsp.norm import rms_norm

ROWS = 8192  # of the vocabulary at once


@torch.no_grad()
def logits(gpt: GPT, axes: Axes, ids: Tensor) -> Tensor:
    """Logits of `ids`, int64 [B, T], the same on all ranks: fp32 [B, T, V] on every rank.

    2 cp tsp and cp tsp tp must divide T. Gathers the head whole on every rank.
    """
    x = gpt(axes.take_local(ids.to(axes.device)))
    x = _gathered(x, axes, ids.shape[1])
    gpt.engine.check()
    reshard(gpt)  # back to fp32: FSDP shows the compute dtype's copies while a module is gathered
    return output_logits(x, _whole(gpt.model.norm.weight), _whole(gpt.head_weight), gpt.config.norm_epsilon)


def output_logits(x: Tensor, gain: Tensor, head: Tensor, epsilon: float) -> Tensor:
    """Of the last layer's output [B, T, h], by the final norm's gain [h] and the head [V, h]: fp32 [B, T, V].

    The head is cast to x's dtype, some rows at a time; the products are summed in fp32.
    """
    normed = rms_norm(x, gain.to(x.device).float(), epsilon).float()
    blocks = (rows.to(x.device).to(x.dtype).float() for rows in head.split(ROWS))
    return torch.cat([normed @ rows.t() for rows in blocks], -1)


def _gathered(x: Tensor, axes: Axes, length: int) -> Tensor:
    """[B, T_local, h] of the ranks that share a sequence to [B, T, h] on each: a sum with zeros elsewhere."""
    whole = x.new_zeros(x.shape[0], length, x.shape[2])
    place = 0
    for start, stop in axes.spans(length):
        whole[:, start:stop] = x[:, place : place + stop - start]
        place += stop - start
    for comm in (axes.sequence, axes.tp):
        whole = comm.all_reduce(whole, "logits").wait()
    return whole


def _whole(parameter: Tensor) -> Tensor:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
