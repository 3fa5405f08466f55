"""Waits of tests: for a condition, never for a time; the one limit is generous and only ends what is broken.

No other file of the tests reads a clock or sleeps; tests/test_tests.py holds them to that.
"""

import random
import socket
import time
from collections.abc import Callable
from pathlib import Path

# What takes two seconds on an idle machine may take a minute beside six busy programs; a hang takes for ever.
LIMIT_S = 600.0


def wait_until(
    condition: Callable[[], object], what: str | Callable[[], object], pause_s: float = 0.02
) -> None:
    """Returns as soon as the condition holds.

    Args:
        condition: asked again and again; it may itself raise, where what is awaited can no longer come.
        what: the condition in words, or a function that says how far things got; for the error.
        pause_s: between two questions; longer where a question starts a program.

    Raises:
        AssertionError: the condition did not hold within LIMIT_S.
    """
    end = time.monotonic() + LIMIT_S
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"not within {LIMIT_S:g} s: {what() if callable(what) else what}")
        time.sleep(pause_s)


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie that nobody has reaped yet has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until_gone(*pids: int) -> None:
    """Returns once these processes have ended."""
    wait_until(lambda: not any(map(is_alive, pids)), lambda: f"{[*filter(is_alive, pids)]} have ended")


def free_port() -> int:
    """One of this host, below those that the kernel gives to outgoing connections: other tests have many."""
    numbers = random.SystemRandom()  # not seeded: several processes run tests, and ask at once
    while True:
        with socket.socket() as probe:
            try:
                probe.bind(("localhost", numbers.randrange(12000, 32000)))
            except OSError:
                continue
            return int(probe.getsockname()[1])


def hang() -> None:
    """Sleeps until this process is killed or its main thread interrupted: what others must find and end."""
    while True:
        time.sleep(3600)
