"""Model FLOPs: what the mathematics needs, never what is computed twice."""

import torch

from megatsp.model.gpt import count_parameters
from megatsp.schema import ModelConfig

# Dense bf16 peak in TFLOP/s, by what torch calls the GPU (vendors' data sheets).
PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "MI300X": 1307.0, "MI325X": 1307.0, "A100": 312.0}


def flops_per_token(model: ModelConfig, seq_length: int) -> float:
    """Forward and backward FLOPs of one token: 6 N, and causal attention.

    N counts every parameter that multiplies: all but an untied input embedding, which is only
    looked up. Attention: 2 products of 2 d FLOPs with T/2 keys on average, times 3 for the backward.
    """
    parameters = count_parameters(model)
    if model.untie_embeddings_and_output_weights:
        parameters -= model.vocab_size * model.hidden_size
    heads = model.num_layers * model.num_attention_heads * model.kv_channels
    return 6.0 * parameters + 6.0 * seq_length * heads


def peak_tflops(device: torch.device) -> float | None:
    """The device's bf16 peak, or None where it is not known (a CPU, another GPU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAK_TFLOPS.items() if known in name), None)
