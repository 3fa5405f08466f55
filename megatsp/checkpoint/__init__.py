"""Checkpoints that any mesh loads and that are never half there."""
