"""`megatsp ckpt`: what can be done with checkpoints without a training, in one process."""
