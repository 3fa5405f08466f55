"""What the system lets one process or user have."""

import resource
from collections.abc import Iterator

from megatsp.doctor.finding import OK, WARNING, Finding

_FILES, _PROCESSES, _LOCKED_BYTES = 4096, 4096, 1 << 30


def check_limits(files: int, processes: int, locked_bytes: int, needs_locked: bool) -> Iterator[Finding]:
    """Soft limits; -1 is unlimited. needs_locked: a GPU or a network card reads memory by itself."""
    rows = [
        ("open files", files, _FILES, "ulimit -n 65536", "sockets between ranks and files of data are many"),
        ("processes", processes, _PROCESSES, "ulimit -u 65536", "ranks, data workers and threads count"),
    ]  # fmt: skip
    if needs_locked:
        why = "pinned memory and RDMA need more"
        rows.append(("locked memory", locked_bytes, _LOCKED_BYTES, "ulimit -l unlimited", why))
    for subject, limit, least, command, why in rows:
        if limit in (-1, resource.RLIM_INFINITY) or limit >= least:
            shown = "unlimited" if limit in (-1, resource.RLIM_INFINITY) else f"{limit:,}"
            yield Finding("limits", subject, OK, shown)
        else:
            fix = f"{command} before the start (or /etc/security/limits.conf; in a container --ulimit)"
            yield Finding("limits", subject, WARNING, f"{limit:,}: {why}", fix)


def soft_limit(kind: int) -> int:
    return resource.getrlimit(kind)[0]
