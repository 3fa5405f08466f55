"""A process that has torch imported already, and forks one that runs pytest for every request.

Half of what a short run of pytest takes is that import. Nothing of ours is imported here: a fork sees the
files of its own copy.
"""

import json
import os
import sys
from typing import Any


def serve(with_torch: bool) -> None:
    """Runs pytest as each line of stdin says; the fork's process id is told first, then its exit status."""
    import pytest

    if with_torch:
        import torch.distributed  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        if (process := os.fork()) == 0:
            _become(request)
            status = 3  # pytest's for an error of its own
            try:
                status = int(pytest.main(request["arguments"]))
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        print(process, flush=True)
        _, code = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(code), flush=True)


def _become(request: dict[str, Any]) -> None:
    """What `python -m pytest` would be in the folder, with this environment and output."""
    os.setsid()
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.path[:] = [
        request["folder"],
        *request["paths"],
        *(p for p in sys.path if p not in request["not_paths"]),
    ]
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for here, there in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(here, there)
    sys.argv[:] = ["pytest", *request["arguments"]]
