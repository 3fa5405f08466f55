"""A worker process: partitions come in on a connection that it inherits, what became of them goes back.

It ends when the connection does, so nothing is left running after the parent, however that ended.
"""

import ctypes
import gc
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from megatsp import launcher
from megatsp.data.preprocess.part import BadRecord, Part, Setup, write_part
from megatsp.data.tokenizer import load_tokenizer

REPORT_S = 0.3
PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Report:
    """What a partition is up to; `finished` at its end."""

    part: Part
    finished: bool


@dataclass(frozen=True)
class Failure:
    """Why a worker has ended."""

    kind: str  # bad record, disk, mistake or bug
    message: str


def main(descriptor: int) -> None:
    """Receives a Setup, then (index, pieces) again and again until None; sends Reports, or a Failure."""
    if sys.platform == "linux":  # at once, not with the next report
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    with Connection(descriptor) as connection:
        try:
            _work(connection)
        except (BrokenPipeError, ConnectionResetError, EOFError):
            pass  # the parent has gone
        except BadRecord as error:
            connection.send(Failure("bad record", str(error)))
        except OSError as error:
            where = f" {error.filename}" if error.filename else ""
            connection.send(Failure("disk", f"cannot write{where}: {error.strerror or error}"))
        except Exception as error:
            if launcher.is_users(error):
                connection.send(Failure("mistake", str(error)))
            else:
                connection.send(Failure("bug", "".join(traceback.format_exception(error))))


def _work(connection: Connection) -> None:
    setup: Setup = connection.recv()
    tokenizer = load_tokenizer(setup.tokenizer)
    if tokenizer.fingerprint != setup.fingerprint:
        raise ValueError(f"the tokenizer {setup.tokenizer} has changed since the command began")
    renderer: Any = None
    if setup.roles:
        from megatsp.data.sft import Renderer

        renderer = Renderer(tokenizer, setup.format, setup.chat_template)
    gc.freeze()  # what is loaded stays
    while (job := connection.recv()) is not None:
        index, pieces = job
        part = write_part(setup, tokenizer, renderer, index, pieces, _reporter(connection))
        connection.send(Report(part, True))


def _reporter(connection: Connection) -> Callable[[Part], None]:
    last = time.perf_counter()

    def report(part: Part) -> None:
        nonlocal last
        if time.perf_counter() - last > REPORT_S:
            last = time.perf_counter()
            connection.send(Report(part, False))

    return report
