"""Training: the loop (run), and one file each for what it uses."""
