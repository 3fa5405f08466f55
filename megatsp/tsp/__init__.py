"""Folded tensor and sequence parallelism: weights stream past the tokens, in buckets."""
