"""Flash attention, forward and backward, as steps that carry their state; libraries' own, one a module."""

from megatsp_kernels.attention.op import (
    AttentionState,
    attention,
    attention_backward_step,
    attention_delta,
    attention_step,
)

__all__ = [
    "AttentionState",
    "attention",
    "attention_backward_step",
    "attention_delta",
    "attention_step",
]
