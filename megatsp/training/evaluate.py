"""The loss on samples that are not trained on."""

import math
from collections.abc import Callable

import torch

from megatsp.data.blend import Blend
from megatsp.data.loader import Share, read_batch
from megatsp.data.tokenizer import Tokenizer
from megatsp.model.gpt import GPT
from megatsp.model.parallelize import reshard
from megatsp.training.ranks import on_device, sum_over_ranks


@torch.no_grad()
def evaluate(
    gpt: GPT,
    device: torch.device,
    blend: Blend,
    split: str,
    num_samples: int,
    share: Share,
    tokenizer: Tokenizer,
    is_cut_off: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Loss (nats per token) and, where the tokenizer's ids have exact bytes, bits per byte; {} if no token
    is trained.

    Over num_samples samples spread evenly over the split, or all of it; on all ranks.

    is_cut_off: asked after every global batch, of all ranks.
    Returns them by their metrics' names; None if it was cut off. split: val or test.
    """
    size = share.global_batch_size
    draws = blend.spread(num_samples)
    bytes_per_token = tokenizer.bytes_per_token()
    widths = None if bytes_per_token is None else torch.from_numpy(bytes_per_token).to(device)
    total = torch.zeros(3, dtype=torch.float64, device=device)  # nats, tokens, bytes
    for start in range(0, len(draws), size):
        # Past the end the last sample is repeated without weight: every rank takes part in every batch.
        places = range(start, start + size)
        for chosen in share.micro_batches(places):
            host = read_batch(blend, [draws[min(p, len(draws) - 1)] for p in chosen], share.spans)
            ids, labels, mask, first = on_device(host, device)
            mask *= mask.new_tensor([float(p < len(draws)) for p in chosen])[:, None]
            total[0] += gpt(ids, labels, mask, first).sum(dtype=torch.float64)
            total[1] += mask.sum(dtype=torch.float64)
            if widths is not None:
                total[2] += (widths[labels] * mask).sum(dtype=torch.float64)
        if is_cut_off():
            reshard(gpt)
            gpt.engine.check()
            return None
    reshard(gpt)
    nats, tokens, num_bytes = sum_over_ranks(total).tolist()
    gpt.engine.check()
    if not tokens:  # all are masked: there is no loss
        return {}
    losses = {f"{split}/lm loss": nats / tokens}
    return losses | ({f"{split}/bits-per-byte": nats / math.log(2) / num_bytes} if num_bytes else {})
