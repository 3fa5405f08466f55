"""Rank 0 of a roll call: listens, hears every rank, answers each.

A connection is one line either way. First rank 0 names the file in the shared folder that holds the
job's token, and its clock; the rank sends its answer with the token; once all have, or time is up, rank
0 tells each what became of it. Who has not read the token is heard only if it knows the job's number,
as one that does not see the folder; anybody else is hung up on.
"""

import hmac
import json
import os
import resource
import selectors
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatsp.preflight.decide import Answer

_MOST_BYTES = 16384  # of an answer
_BACKLOG = 4096  # the kernel's somaxconn limits it
_MORE_FILES = 64  # beside one a rank


class Token:
    """A secret in the shared folder, of this roll call alone; in a `with`, which removes it.

    Raises:
        ValueError: the folder cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        self.value = os.urandom(24).hex()
        self.path = folder / f"roll_call_{os.urandom(8).hex()}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(self.value)
                file.flush()
                os.fsync(descriptor)
        except OSError as error:
            raise ValueError(f"--folder {folder}: {error}; give one that all nodes can write to") from error

    def __enter__(self) -> "Token":
        return self

    def __exit__(self, *error: object) -> None:
        self.path.unlink(missing_ok=True)


def listen(port: int, world: int) -> socket.socket:
    """A socket on every interface of this node, for so many ranks at once.

    Raises:
        ValueError: the port is taken, or too few files may be open.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = world + _MORE_FILES
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ValueError(
            f"this node lets a process open {hard} files: {world} ranks need {needed} (ulimit -n)"
        )
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, backlog=_BACKLOG, dualstack_ipv6=both)
    except OSError as error:
        raise ValueError(
            f"cannot listen at port {port}: {error}; choose another launch.slurm.port"
        ) from error


class Host:
    """The connections of one roll call; in a `with`, which closes them."""

    def __init__(self, listener: socket.socket, token: Token, job: str, world: int) -> None:
        self._listener, self._token, self._job, self._world = listener, token, job, world
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        listener.setblocking(False)
        self._heard: dict[socket.socket, tuple[float, bytes]] = {}  # who has not answered yet
        self._answers: dict[int, tuple[Answer, socket.socket]] = {}

    def __enter__(self) -> "Host":
        return self

    def __exit__(self, *error: object) -> None:
        for key in list(self._selector.get_map().values()):
            assert isinstance(key.fileobj, socket.socket)
            key.fileobj.close()
        self._selector.close()

    def collect(self, deadline: float) -> list[Answer]:
        """The answers of the other ranks: of all, or of those that came before `time.monotonic()` is that."""
        while len(self._answers) < self._world - 1 and (left := deadline - time.monotonic()) > 0:
            for key, _ in self._selector.select(min(left, 1.0)):
                assert isinstance(key.fileobj, socket.socket)
                if key.fileobj is self._listener:
                    self._welcome()
                else:
                    self._hear(key.fileobj)
        return [answer for answer, _ in self._answers.values()]

    def tell(self, messages: Mapping[int, Mapping[str, Any]]) -> None:
        """Sends each rank its message; one that has gone meanwhile is not missed."""
        for rank, (_, guest) in self._answers.items():
            with suppress(OSError):
                guest.settimeout(5.0)
                guest.sendall(json.dumps(messages[rank]).encode() + b"\n")

    def _welcome(self) -> None:
        with suppress(OSError):  # it has hung up again
            guest, _ = self._listener.accept()
            guest.setblocking(False)
            self._selector.register(guest, selectors.EVENT_READ)
            self._heard[guest] = time.time(), b""
            guest.sendall(json.dumps({"token_in": self._token.path.name}).encode() + b"\n")

    def _hang_up(self, guest: socket.socket) -> None:
        self._heard.pop(guest, None)
        gone = [rank for rank, (_, other) in self._answers.items() if other is guest]
        for rank in gone:
            del self._answers[rank]
        self._selector.unregister(guest)
        guest.close()

    def _hear(self, guest: socket.socket) -> None:
        try:
            chunk = guest.recv(_MOST_BYTES)
        except OSError:
            chunk = b""
        if not chunk or guest not in self._heard:  # it ends, or says more than an answer
            self._hang_up(guest)
            return
        since, text = self._heard[guest]
        text += chunk
        if len(text) > _MOST_BYTES:
            self._hang_up(guest)
        elif not text.endswith(b"\n"):
            self._heard[guest] = since, text
        elif (answer := self._read(text, since, time.time())) is None:
            self._hang_up(guest)
        else:
            self._keep(answer, guest)

    def _keep(self, answer: Answer, guest: socket.socket) -> None:
        """A rank's later answer counts, but none without the token replaces one with it."""
        before = self._answers.get(answer.rank)
        if before is not None and before[0].sees_folder and not answer.sees_folder:
            self._hang_up(guest)
            return
        if before is not None:
            self._hang_up(before[1])
        del self._heard[guest]
        self._answers[answer.rank] = answer, guest

    def _read(self, text: bytes, sent: float, arrived: float) -> Answer | None:
        """An answer of this job; None: it is something else."""
        try:
            said = json.loads(text)
            rank, local_rank, token = int(said["rank"]), int(said["local_rank"]), str(said["token"])
            node, boot_id, facts = str(said["node"]), str(said["boot_id"]), dict(said["facts"])
            clock = float(said["clock"])
            ours = hmac.compare_digest(token.encode(), self._token.value.encode())
            known = ours or (not token and str(said["job"]) == self._job)
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
        if not known or not 0 < rank < self._world:
            return None
        offset, error = clock - (sent + arrived) / 2, (arrived - sent) / 2
        return Answer(rank, node, local_rank, boot_id, ours, offset, error, facts if ours else {})
