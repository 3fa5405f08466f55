"""Ranks of several nodes: who failed is known by its number among all, and its peers are not blamed."""

import os
import subprocess
import sys
from pathlib import Path

from runs import RANK_VARIABLES, ROOT
from waiting import LIMIT_S, free_port

from megatsp.exit_status import USER_ERROR
from megatsp.launcher.outcome import read_outcomes

# A rank's program, in place of megatsp: rank 3 says a mistake, the others wait for it in vain.
RANK = """
import os, time
from megatsp.launcher import run_rank
import megatsp.validate as ours

def work():
    if os.environ["RANK"] == "3":
        exec(compile("raise ValueError('the cause')", "x", "exec"), vars(ours))
    time.sleep(3600)

run_rank(work)
"""
NODE = """
import sys
from megatsp import launcher
from megatsp.launcher.agent import Nodes

index, port = int(sys.argv[1]), sys.argv[2]
once = launcher.Restarts(0, 0.0, lambda: -1)
nodes = Nodes(index, 2, f"localhost:{port}", timeout_s=600)
sys.exit(launcher.launch_local(2, [sys.executable, sys.argv[3]], once, nodes))
"""


def test_a_failure_on_the_second_node_is_its_ranks_own(tmp_path: Path) -> None:
    rank, node, attempt = tmp_path / "rank.py", tmp_path / "node.py", tmp_path / "attempt"
    rank.write_text(RANK)
    node.write_text(NODE)
    attempt.mkdir()
    environment = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    environment |= {"MEGATSP_ATTEMPT_FOLDER": str(attempt), "PYTHONPATH": str(ROOT)}
    port = str(free_port())
    processes = [
        subprocess.Popen([sys.executable, node, str(index), port, rank], env=environment, cwd=ROOT)
        for index in (0, 1)
    ]
    try:
        assert processes[1].wait(timeout=LIMIT_S) == USER_ERROR
    finally:
        for process in processes:
            process.kill()
            process.wait()
    (only,) = read_outcomes(attempt)
    assert (only.rank, only.status, only.headline) == (3, USER_ERROR, "the cause")
    assert sorted(path.name for path in attempt.glob("rank_*.log")) == [
        f"rank_{number:05d}.log" for number in range(4)
    ]
