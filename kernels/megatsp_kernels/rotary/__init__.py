"""Rotary position embedding, forward and backward, of views and into views."""

from megatsp_kernels.rotary.op import rotate

__all__ = ["rotate"]
