"""Model FLOPs: what the mathematics needs, never what is computed twice."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatsp.axes import Axes
from megatsp.data.loader import Share
from megatsp.model.gpt import adapter_shapes, count_parameters
from megatsp.schema import FinetuneConfig, ModelConfig
from megatsp.training.step import Batch

# Dense bf16 peak in TFLOP/s, by what torch calls the GPU (vendors' data sheets).
PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "MI300X": 1307.0, "MI325X": 1307.0, "A100": 312.0}


def flops_per_token(model: ModelConfig, seq_length: int, finetune: FinetuneConfig | None = None) -> float:
    """Forward and backward FLOPs of one token of a plain causal sequence: T/2 keys on average."""
    return flops(model, 1, seq_length / 2, finetune)


def flops(model: ModelConfig, tokens: float, pairs: float, finetune: FinetuneConfig | None = None) -> float:
    """Forward and backward FLOPs of so many tokens: 6 N each, and attention of so many pairs.

    N counts every parameter that multiplies: all but an untied input embedding, which is only
    looked up. A pair is a query and a key that it sees: 2 products of 2 d FLOPs, times 3 for the backward.
    With finetune's adapters N is frozen: 4 N, for no gradient of it is needed, and 6 of each of theirs.
    """
    parameters = count_parameters(model)
    if model.untie_embeddings_and_output_weights:
        parameters -= model.vocab_size * model.hidden_size
    heads = model.num_layers * model.num_attention_heads * model.kv_channels
    shapes = adapter_shapes(model, finetune) if finetune is not None and finetune.lora_rank else {}
    adapters = sum(rows * columns for rows, columns in shapes.values())
    return (6.0 * adapters + (4.0 if adapters else 6.0) * parameters) * tokens + 12.0 * pairs * heads


def attended_pairs(first: Tensor) -> int:
    """Pairs of a query and a key of its own document, itself included.

    first: int64 [.., T], for each position that of the first token of its document.
    """
    positions = torch.arange(first.shape[-1], device=first.device)
    return int((positions - first + 1).sum())


def own_pairs(batches: Sequence[Batch], share: Share, axes: Axes, length: int) -> float:
    """This rank's share of the pairs of tokens that attend to each other, in samples of `length` tokens."""
    sharers = dist.get_world_size() // axes.dp_size
    plain = share.micro_batch_size * length * length / 2  # as `flops_per_token` counts
    return sum(plain if first is None else attended_pairs(first) for *_, first in batches) / sharers


def peak_tflops(device: torch.device) -> float | None:
    """The device's bf16 peak, or None where it is not known (a CPU, another GPU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAK_TFLOPS.items() if known in name), None)
