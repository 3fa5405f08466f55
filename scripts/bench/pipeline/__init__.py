"""The parts of scripts/bench/data.py: a measurement a file."""
