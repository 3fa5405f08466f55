"""The other ranks of a roll call: each calls rank 0 until it answers, and is told what becomes of it."""

import json
import re
import socket
import time
from pathlib import Path
from typing import Any

_MOST_BYTES = 65536
_LONGEST_PAUSE_S = 2.0


class Unreachable(Exception):
    """Rank 0 did not answer in time; the text says what happened last."""


class Over(Exception):
    """The roll call has ended without this rank, as its report in the folder says."""


def attend(
    address: tuple[str, int],
    folder: Path,
    report: str,
    answer: dict[str, Any],
    deadline: float,
    patience_s: float,
) -> dict[str, Any]:
    """Gives rank 0 this rank's answer and returns what it tells.

    Args:
        address: rank 0's name and port.
        folder: where rank 0 wrote the token.
        report: name of the file in it that rank 0 writes when the roll call is over.
        answer: what to say; token and clock are added.
        deadline: by `time.monotonic()`, for reaching it.
        patience_s: how long it may then take, until all others have answered.

    Raises:
        Unreachable: nobody, or nobody of this job, answers there.
        Over: nor will they, for the report has been written meanwhile.
    """
    before = _stamp(folder / report)
    pause, last = 0.1, "nobody answers"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection(address, timeout=min(left, 20.0)) as rank_0:
                if rank_0.getsockname() == rank_0.getpeername():  # reached itself, from that port
                    raise OSError("nobody answers")
                return _talk(rank_0, folder, answer, patience_s)
        except (OSError, ValueError) as error:
            last = str(error) or type(error).__name__
        if _stamp(folder / report) != before:
            raise Over(last)
        # Ranks that were refused together do not come back together.
        time.sleep(min(pause * (1 + answer["rank"] % 16 / 16), max(0.0, deadline - time.monotonic())))
        pause = min(2 * pause, _LONGEST_PAUSE_S)
    raise Unreachable(last)


def _stamp(file: Path) -> tuple[int, int]:
    """Tells a file from the one that replaces it; (0, 0) where none is seen."""
    try:
        found = file.stat()
    except OSError:
        return 0, 0
    return found.st_ino, found.st_mtime_ns


def _talk(rank_0: socket.socket, folder: Path, answer: dict[str, Any], patience_s: float) -> dict[str, Any]:
    with rank_0.makefile("rb") as lines:
        name = str(_line(lines)["token_in"])
        said = {**answer, "token": _token(folder, name), "clock": time.time()}
        rank_0.sendall(json.dumps(said).encode() + b"\n")
        rank_0.settimeout(patience_s)
        return _line(lines)


def _line(lines: Any) -> dict[str, Any]:
    text = lines.readline(_MOST_BYTES)
    if not text.endswith(b"\n"):
        raise OSError("what answers there hangs up on this rank: is it rank 0 of this job?")
    said = json.loads(text)
    if not isinstance(said, dict) or not said.keys() & {"token_in", "status"}:
        raise OSError("what answers there is not rank 0 of this job")
    return said


def _token(folder: Path, name: str) -> str:
    """What the file holds; "" if it is not seen. Looked for only now, so that no cache knows it as absent."""
    if not re.fullmatch(r"roll_call_[0-9a-f]{16}", name):  # a stranger's wish to read another file
        return ""
    try:
        return (folder / name).read_text()
    except OSError:
        return ""
