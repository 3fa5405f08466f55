"""Set before any test module is imported, and inherited by the ranks that tests start."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # transformers never asks a server
os.environ["WANDB_MODE"] = "offline"  # nor does wandb
