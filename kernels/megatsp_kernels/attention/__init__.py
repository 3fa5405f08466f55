"""Flash attention, forward and backward: over one block of keys, or as steps that carry their state."""

from megatsp_kernels.attention.op import attention_backward, attention_forward
from megatsp_kernels.attention.ring import (
    AttentionState,
    attention,
    attention_backward_step,
    attention_delta,
    attention_step,
)

__all__ = [
    "AttentionState",
    "attention",
    "attention_backward",
    "attention_backward_step",
    "attention_delta",
    "attention_forward",
    "attention_step",
]
