"""Set before any test module is imported, and inherited by the ranks that tests start."""

import os
import signal
from collections.abc import Iterator
from contextlib import suppress

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # transformers never asks a server
os.environ["WANDB_MODE"] = "offline"  # nor does wandb
os.environ["OMP_NUM_THREADS"] = "1"  # of tiny tensors, on which a second one only spins
torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run on the CPU; triton reads it when it is imported:
    with suppress(ImportError):  # now, and not in a test that takes it out of the environment
        import triton  # noqa: F401


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT interrupts this process and those it starts; a shell's `pytest &` has both ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
