"""The fault campaign: a few of its faults, and that its checks find what they are for."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from fault_campaign import checks, job  # noqa: E402  # of scripts/, which is no package of ours

from megatsp.checkpoint.manifest import Manifest, entry_of, write_manifest  # noqa: E402
from megatsp.checkpoint.paths import LATEST, folder_of  # noqa: E402

KINDS = ("kill-save", "sigterm", "flip", "nan-machine")


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds processes in /proc")
def test_a_few_faults(tmp_path):
    chosen = [word for kind in KINDS for word in ("--only", kind)]
    command = [sys.executable, "scripts/faults.py", "--count", str(len(KINDS)), "--jobs", "2", *chosen]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "TMPDIR": str(tmp_path)}
    environment = {k: v for k, v in environment.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    output = tmp_path / "faults.md"
    output.write_text("What it is.\n\n<!-- results -->\nold\n")
    campaign = subprocess.run(
        [*command, "--output", str(output)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert campaign.returncode == 0, campaign.stdout + campaign.stderr
    results = json.loads(output.with_suffix(".json").read_text())
    assert [result["kind"] for result in results] == list(KINDS)
    assert all(result["struck"] and not result["problems"] for result in results)
    assert results[0]["restarts"] == 1 and results[2]["redone"] >= 1
    text = output.read_text()
    assert text.startswith("What it is.\n\n<!-- results -->\n") and "old" not in text
    assert text.count("held") == len(KINDS)
    assert not list(tmp_path.glob("megatsp-faults-*"))


def make_run(run: Path) -> Path:
    """A folder as a run of the campaign leaves it."""
    for iteration in checks.SAVED:
        folder = folder_of(run / "checkpoints", iteration)
        folder.mkdir(parents=True)
        (folder / "shard-0.safetensors").write_bytes(b"weights" * iteration)
        write_manifest(folder, Manifest({"shard-0.safetensors": entry_of(b"weights" * iteration)}, {}))
    (run / "checkpoints" / LATEST).write_text(f"{job.ITERATIONS}\n")
    entries = [{"iteration": i, "lm loss": 1 / i} for i in range(1, job.ITERATIONS + 1)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return run


def test_checks_find_what_was_lost_and_what_differs(tmp_path):
    reference, run = make_run(tmp_path / "reference"), make_run(tmp_path / "run")
    checkpoints = run / "checkpoints"
    assert checks.differences(run, reference) == [] == checks.lost(checkpoints, {3, 6, 9, 12})
    metrics = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(metrics.replace("0.5", "0.5000000000000001"))
    (found,) = checks.differences(run, reference)
    assert found == "lm loss 2: 0.5000000000000001, without the fault 0.5"
    (run / "metrics.jsonl").write_text(metrics)
    (folder_of(checkpoints, 6) / "shard-0.safetensors").write_bytes(b"weighty" * 6)
    assert checks.good(checkpoints) == {3, 9, 12}
    assert checks.differences(run, reference) == ["no whole checkpoint of iteration 6"]
    (found,) = checks.lost(checkpoints, {3, 6})
    assert found.startswith("the good checkpoint 6 is lost: shard-0.safetensors")
    shutil.copytree(folder_of(checkpoints, 9), folder_of(checkpoints, 10))  # as if after a signal
    shutil.rmtree(folder_of(checkpoints, 9))
    assert checks.differences(run, reference, keep_last=2) == []
    assert checks.differences(run, reference, keep_last=3) == ["no whole checkpoint of iteration 9"]
    shutil.rmtree(run)
    make_run(run)
    last = folder_of(checkpoints, 12)
    (last / "shard-0.safetensors").write_bytes(b"others!" * 12)
    write_manifest(last, Manifest({"shard-0.safetensors": entry_of(b"others!" * 12)}, {}))
    assert "not the bits" in checks.differences(run, reference)[0]
    (checkpoints / "iter_0000015.tmp").mkdir()
    assert checks.differences(run, reference)[-1] == "iter_0000015.tmp is left among the checkpoints"


def test_what_was_computed_again_is_counted():
    def lines(*texts: str) -> list[tuple[float, str]]:
        return [(float(i), text) for i, text in enumerate(texts)]

    steps = [f" iteration {i:8d}/      12 | lm loss" for i in range(1, 8)]
    resumed = "run: resumed after iteration 3; 23,168 parameters"
    assert job.redone(lines("run: new run; 1 parameter", *steps)) == 0
    assert job.redone(lines("run: new run; ", *steps, resumed, *steps[3:])) == 4
    assert job.redone(lines("run: new run; ", *steps[:2], "run: new run; ", *steps)) == 2
    assert job.iterations(lines(*steps))[-1] == (6.0, 7)


def test_processes_of_a_trial_are_found(tmp_path):
    assert checks.left_running(tmp_path) == []
    with subprocess.Popen(["sleep", "60"], env={**os.environ, job.MARK: str(tmp_path)}) as child:
        try:  # while a process starts its program, the kernel shows an empty environment for a moment
            assert job.wait_until(lambda: job.processes(tmp_path) == [child.pid], 5)
        finally:
            child.kill()
    assert job.processes(tmp_path) == []
