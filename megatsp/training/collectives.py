"""The last collectives of this rank, for a hang: our own record and torch's flight recorder."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from megatsp.comm import Traffic

_SHOWN = 12  # entries of the flight recorder


@dataclass(frozen=True)
class Flight:
    """What torch recorded. posted: how many collectives by process group, whose names all its ranks share;
    lines: the newest of them, as text.
    """

    posted: dict[str, int] = field(default_factory=dict)
    lines: Sequence[str] = ()


def last_posted(traffic: Traffic | None) -> list[str]:
    """Our own record: what was posted last on each axis, and whether it is over."""
    if traffic is None or not traffic.last:
        return ["none"]
    return [
        f"{axis or 'all ranks'}: {last.operation} {last.number} ({last.label}), {last.bytes} bytes, posted "
        f"{time.monotonic() - last.since:.1f} s ago, {'finished' if last.has_finished else 'NOT finished'}"
        for axis, last in traffic.last.items()
    ]


def flight() -> Flight:
    """torch's flight recorder, of gloo's process groups and NCCL's, as far as this torch has one."""
    c10d = getattr(torch._C, "_distributed_c10d", None)
    recorders = [getattr(c10d, f"_dump_{name}_trace_json", None) for name in ("fr", "nccl")]
    posted: dict[str, int] = {}
    lines: list[str] = []
    for dump in recorders:
        try:
            trace = json.loads(dump()) if dump is not None else {}
        except (RuntimeError, ValueError) as error:
            lines.append(f"not to be read: {error}")
            continue
        entries = trace.get("entries", [])
        names = {str(entry["pg_id"]): " ".join(entry["process_group"]) for entry in entries}
        for group, status in trace.get("pg_status", {}).items():
            if group in names:
                posted[names[group]] = int(status["last_enqueued_collective"])
        lines += [_entry(entry) for entry in entries[-_SHOWN:]]
    return Flight(posted, lines or ["empty"])


def _entry(entry: dict[str, Any]) -> str:
    group = " ".join(entry["process_group"])
    over = (
        "finished"
        if entry["retired"] or entry["state"] == "completed"
        else f"NOT finished ({entry['state']})"
    )
    number = f"p2p {entry['p2p_seq_id']}" if entry["is_p2p"] else entry["collective_seq_id"]
    sizes = " ".join(map(str, entry["input_sizes"]))
    return f"group {group}, {number}: {entry['profiling_name']} {sizes} {over}"
