"""What scripts/faults.py does to a training run, and what must hold afterwards."""
