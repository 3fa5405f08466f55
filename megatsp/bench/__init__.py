"""Schemes side by side on the same work: time, memory, traffic; measured or simulated."""
