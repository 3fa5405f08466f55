"""`megatsp doctor`: what could keep a run from starting, from being right or from being fast."""
