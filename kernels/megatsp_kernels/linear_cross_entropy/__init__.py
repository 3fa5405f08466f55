"""Cross-entropy of x w with no logits in memory: of a whole vocabulary, or a bucket of it at a time."""

from megatsp_kernels.linear_cross_entropy.op import (
    cross_entropy_backward_step,
    cross_entropy_step,
    linear_cross_entropy,
)

__all__ = ["cross_entropy_backward_step", "cross_entropy_step", "linear_cross_entropy"]
