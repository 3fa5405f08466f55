"""Whether ranks of this host would find each other."""

import socket
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatsp.doctor.finding import OK, PROBLEM, WARNING, Finding

_TIMEOUT = timedelta(seconds=20)


def check_name(name: str, resolve: Callable[[str], Any] = socket.gethostbyname) -> Iterator[Finding]:
    try:
        address = resolve(name)
    except OSError as error:
        fix = f"add '127.0.0.1 {name}' to /etc/hosts (alone), or a DNS entry (several hosts)"
        text = f"{name} has no address: {error.strerror or error}"
        yield Finding("network", "host name", WARNING, text, fix)
    else:
        yield Finding("network", "host name", OK, f"{name} is {address}")


def two_ends_error() -> str:
    """Why two gloo ends on this host, with sockets as two ranks have, cannot all-reduce; "" if they can."""
    wrong: list[str] = []
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=_TIMEOUT)

    def meet(rank: int) -> None:
        try:
            own = dist.TCPStore("127.0.0.1", store.port, wait_for_workers=False, timeout=_TIMEOUT)
            group: Any = dist.ProcessGroupGloo(own, rank, 2, _TIMEOUT)
            number = torch.full((3,), float(rank + 1))
            group.allreduce([number]).wait()
            if number.tolist() != [3.0] * 3:
                wrong.append(f"1 + 2 gave {number.tolist()}")
        except (RuntimeError, ValueError) as error:
            wrong.append(str(error).splitlines()[0])

    threads = [threading.Thread(target=meet, args=(rank,), daemon=True) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * _TIMEOUT.total_seconds())
    if any(thread.is_alive() for thread in threads):
        wrong.append(f"no answer within {2 * _TIMEOUT.total_seconds():.0f} s")
    return wrong[0] if wrong else ""


def check_two_ends(error: str) -> Iterator[Finding]:
    if error:
        fix = "set GLOO_SOCKET_IFNAME (`ip addr` lists interfaces); let the firewall pass localhost"
        yield Finding("network", "gloo", PROBLEM, f"two ends on this host cannot all-reduce: {error}", fix)
    else:
        yield Finding("network", "gloo", OK, "two ends on this host all-reduce")
