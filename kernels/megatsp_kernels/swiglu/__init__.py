"""SwiGLU of a gate and an up projection that lie side by side, forward and backward."""

from megatsp_kernels.swiglu.op import swiglu, swiglu_backward

__all__ = ["swiglu", "swiglu_backward"]
