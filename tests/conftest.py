"""Set before any test module is imported, and inherited by the ranks that tests start."""

import os
import random
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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--random-files", type=int, metavar="SEED", help="run the files in another order")


def pytest_report_header(config: pytest.Config) -> list[str]:
    seed = config.getoption("--random-files")
    return [] if seed is None else [f"files in the order of --random-files {seed}"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    seed = config.getoption("--random-files")
    if seed is not None:
        items[:] = in_random_order_of_files(items, seed)


def in_random_order_of_files(items: list[pytest.Item], seed: int) -> list[pytest.Item]:
    """The tests of one file stay together and in order, since they may share what a module fixture made.

    By the seed alone, for every process of pytest-xdist must come to the same order.
    """
    files: dict[object, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    order = list(files)
    random.Random(seed).shuffle(order)
    return [item for file in order for item in files[file]]


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT interrupts this process and those it starts; a shell's `pytest &` has both ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
