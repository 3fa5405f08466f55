"""RMSNorm, alone and of a sum, forward and backward."""

from megatsp_kernels.rms_norm.op import add_rms_norm, rms_norm, rms_norm_backward

__all__ = ["add_rms_norm", "rms_norm", "rms_norm_backward"]
