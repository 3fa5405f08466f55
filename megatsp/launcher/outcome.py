"""What a rank of a job leaves behind for whoever decides what comes next: how it ended, unless with 0.

Exit statuses alone do not tell: srun knows only the highest one, and kills ranks that then have another.
"""

import json
import os
import socket
import time
from dataclasses import asdict
from pathlib import Path

from megatsp.launcher.failures import Failure, first_causes

# In the environment of a job's ranks: the folder of their outcomes and logs.
ATTEMPT_FOLDER = "MEGATSP_ATTEMPT_FOLDER"
_DONE = "done"  # the file by which rank 0 says that all is done; launch/job.sh does, of a preflight


def node_name() -> str:
    """This node's name: Slurm's, or the host's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def write_outcome(folder: Path, failure: Failure) -> bool:
    """Leaves a rank's outcome, unless it left one itself; returns whether there is one.

    A folder that cannot be written to must not hide the failure: that goes on, without.
    """
    path = folder / f"outcome_{failure.rank:05d}.json"
    if path.exists():
        return True
    text = json.dumps({**asdict(failure), "host": failure.host or node_name(), "time": time.time()})
    try:
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(text)
        temporary.rename(path)
    except OSError as error:
        print(f"megatsp: {path} cannot be written: {error.strerror}", flush=True)
        return False
    return True


def read_outcomes(folder: Path) -> list[Failure]:
    """The outcomes in an attempt's folder, the cause first: see `first_causes`."""
    found = []
    for path in folder.glob("outcome_*.json"):
        values = json.loads(path.read_text())
        found.append((values.pop("time"), Failure(**values)))
    return first_causes([failure for _, failure in sorted(found, key=lambda pair: pair[0])])


def write_done(folder: Path) -> None:
    """Says that all is done. Where that cannot be written, it is started again, and ends at once."""
    try:
        (folder / _DONE).touch()
    except OSError as error:
        print(f"megatsp: {folder / _DONE} cannot be written: {error.strerror}", flush=True)


def is_done(folder: Path) -> bool:
    """Whether `write_done` was called, on whatever node."""
    return (folder / _DONE).exists()
