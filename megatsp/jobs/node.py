"""`python -m megatsp.jobs.node COMMAND...`: one task of srun on each node, which starts the ranks of it.

torch's elastic agent, once: whether and where ranks start again, the job's script decides. Signals are passed
on to the ranks, and they end with their agent.
"""

import os
import sys
from pathlib import Path

from megatsp import launcher
from megatsp.launcher.agent import Nodes
from megatsp.launcher.failures import Failure
from megatsp.launcher.outcome import write_outcome


def main(arguments: list[str]) -> int:
    """Runs `megatsp` with these arguments as MEGATSP_NPROC ranks here; the other nodes do the same."""
    here = os.environ
    nodes = Nodes(
        int(here["SLURM_PROCID"]),
        int(here["SLURM_STEP_NUM_TASKS"]),
        f"{here['MASTER_ADDR']}:{here['MASTER_PORT']}",
        timeout_s=600,
    )
    once = launcher.Restarts(0, 0.0, lambda: -1)
    command = [sys.executable, "-m", "megatsp", *arguments]
    nproc = int(here["MEGATSP_NPROC"])
    status = launcher.launch_local(nproc, command, once, nodes)
    if status == launcher.REQUEUE:
        stopped = Failure(nodes.index * nproc, status, "stopped before its node's ranks ran")
        return 0 if write_outcome(Path(here[launcher.ATTEMPT_FOLDER]), stopped) else status
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
