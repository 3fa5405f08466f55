"""The report of one host and of several, and the exit status."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from runs import RANK_VARIABLES, ROOT
from waiting import LIMIT_S, free_port

from megatsp.doctor import checks, command
from megatsp.doctor.finding import OK, PROBLEM, WARNING, Finding
from megatsp.doctor.report import as_json, count, merge, table

WELL = [Finding("versions", "torch", OK, "2.13.0"), Finding("kernels", "/dev/shm", OK, "16 GiB")]
SLOW = Finding("file systems", "writing", WARNING, "12 MB/s", "choose a faster output_dir")


def test_hosts_that_agree_are_told_once():
    hosts = {"a": WELL, "b": [WELL[0], Finding("kernels", "/dev/shm", OK, "17 GiB")], "c": [*WELL, SLOW]}
    assert [(f.subject, names) for f, names in merge(hosts)] == [
        ("torch", ["a", "b", "c"]), ("/dev/shm", ["a", "b", "c"]), ("writing", ["c"]),
    ]  # fmt: skip
    lines = list(table(hosts))
    assert lines[0].endswith("2.13.0 (of 3 hosts)")
    assert lines[2].startswith("warning  file systems") and lines[2].endswith("12 MB/s  [c]")
    assert lines[3].strip() == "-> choose a faster output_dir"
    assert lines[-1] == "0 problems, 1 warnings on 3 hosts"


def test_versions_that_differ_are_a_problem():
    hosts = {f"host{n}": [Finding("versions", "torch", OK, "2.13.0" if n else "2.12.1")] for n in range(8)}
    assert count(hosts) == {OK: 2, WARNING: 0, PROBLEM: 1}
    problem = next(f for f, _ in merge(hosts) if f.status == PROBLEM)
    more = "2.13.0 on host1, host2, host3, host4 and 3 more"
    assert problem.text == f"2.12.1 on host0; {more}"
    assert [f["status"] for f in as_json(hosts)["findings"]] == [OK, OK, PROBLEM]


@pytest.mark.parametrize(
    ("findings", "status"), [([*WELL, SLOW], 0), ([Finding("a", "b", PROBLEM, "c", "d")], 1)]
)
def test_exit_status(findings, status, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(checks, "examine", lambda output_dir: findings)
    monkeypatch.delenv("RANK", raising=False)
    assert command.run(["--output-dir", str(tmp_path), "--json"]) == status
    found = json.loads(capsys.readouterr().out)
    assert found["counts"][PROBLEM] == status and len(found["findings"]) == len(findings)
    assert command.run([]) == status
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"{status} problems")


def test_ranks_of_a_launcher_print_one_table(tmp_path: Path):
    """Under torchrun's variables: two ranks of one host, and a problem that both end with."""
    environment = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    environment |= {"MASTER_ADDR": "127.0.0.1", "WANDB_MODE": "wrong"}
    environment |= {"MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "megatsp", "doctor", "--output-dir", str(tmp_path)],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    (first, error), (second, _) = (rank.communicate(timeout=LIMIT_S) for rank in ranks)
    assert [rank.returncode for rank in ranks] == [1, 1], error
    assert second == ""
    lines = first.splitlines()
    assert lines[-1].startswith("1 problems, ") and lines[-1].endswith(" on 1 host")
    assert any("WANDB_MODE=wrong" in line for line in lines)
    assert list(tmp_path.iterdir()) == []
