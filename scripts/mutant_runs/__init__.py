"""What scripts/mutants.py does: small faults, the tests that should see each, and what they say of it."""
