"""Triton kernels, and their plain references, for megatsp; they need torch and Triton alone."""
