"""Set before any test module is imported, and inherited by the ranks that tests start."""

import os

import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # transformers never asks a server
os.environ["WANDB_MODE"] = "offline"  # nor does wandb
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run on the CPU; triton reads it when it is imported
