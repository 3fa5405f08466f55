"""Attention over a sharded sequence, one exchange a file: used alike by the cp axis and by TSP."""
