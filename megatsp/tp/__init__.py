"""Tensor parallelism: weights cut over a layer's heads, FFN columns and the vocabulary."""
