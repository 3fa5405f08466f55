"""What W&B is told of a run's code and job."""

import pytest

import megatsp
from megatsp.training import origin
from megatsp.training.origin import code_version, slurm_job


def test_a_checkout_is_known_by_its_commit(monkeypatch):
    answers = {"rev-parse": "0123abc\n", "status": " M megatsp/cli.py\n"}
    monkeypatch.setattr(origin, "_git", lambda checkout, *arguments: answers[arguments[0]])
    expected = {"megatsp": megatsp.__version__, "commit": "0123abc", "dirty": True}
    monkeypatch.setattr(origin.Path, "exists", lambda path: path.name == ".git")
    assert code_version() == expected
    answers["status"] = ""
    assert code_version() == expected | {"dirty": False}
    monkeypatch.setattr(origin, "_git", lambda checkout, *arguments: None)
    assert code_version() == {"megatsp": megatsp.__version__}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, {}),
        ({"SLURM_JOB_ID": "7"}, {"job_id": "7", "restart": "0", "nodes": ""}),
        (
            {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2",
             "SLURM_RESTART_COUNT": "3", "SLURM_JOB_NODELIST": "n[1-2]"},
            {"job_id": "7_2", "restart": "3", "nodes": "n[1-2]"},
        ),
    ],
)  # fmt: skip
def test_a_job_is_known_by_its_number(monkeypatch, environment, expected):
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_JOB_NODELIST"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert slurm_job() == expected
