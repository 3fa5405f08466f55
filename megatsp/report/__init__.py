"""A run's folder as one page: what `megatsp report` writes."""
