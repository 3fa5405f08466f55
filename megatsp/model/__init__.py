"""The GPT model: what it is (gpt), its first weights (init), and how Axes apply to it (parallelize)."""
