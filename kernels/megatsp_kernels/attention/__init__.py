"""Flash attention over one block of keys, forward and backward, with its log-sum-exp."""

from megatsp_kernels.attention.op import attention_backward, attention_forward

__all__ = ["attention_backward", "attention_forward"]
