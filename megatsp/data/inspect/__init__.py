"""`megatsp data inspect`: the samples of a run as training reads them, and what its data is made of."""
