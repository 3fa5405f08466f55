"""scripts/gpu_check.sh from end to end without a GPU, and what becomes of a part that fails."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import LIMIT_S

ROOT = Path(__file__).resolve().parents[1]
PARTS = ["kernel tests", "benchmarks", "distributed kernels", "memory of one rank", "preflight"]


@pytest.fixture
def gpu_check(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module("gpu_check")


@pytest.mark.slow
@pytest.mark.timeout(5 * LIMIT_S)
def test_the_whole_check_runs_on_a_cpu(tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path)}
    command = ["bash", str(ROOT / "scripts" / "gpu_check.sh"), "--cpu-smoke", "--commit", "abc1234"]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=5 * LIMIT_S)
    assert found.returncode == 0, found.stdout + found.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    parts = {part["name"]: part for part in report["parts"]}
    assert [*parts] == PARTS
    assert all(part["status"] in ("passed", "nothing to check") for part in parts.values())
    assert "passed" in parts["kernel tests"]["end"]
    benchmarks = parts["benchmarks"]["data"]["benchmarks"]["results"]
    assert {"swiglu/forward", "swiglu/backward"} <= {result["name"] for result in benchmarks}
    assert all(result["times_ms"]["megatsp"] for result in benchmarks)
    memory = parts["memory of one rank"]["data"]["memory"]
    assert memory["ranks"] == 2 and memory["measured"]["peak"] == memory["simulated"]["peak"] > 0
    preflight = parts["preflight"]["data"]["preflight"]
    assert all(s["right"] for m in preflight["measurements"] for s in m["measured"])
    assert any("all_gather over tsp = 2" in m["what"] for m in preflight["measurements"])
    assert "all_gather over tsp = 2" in parts["preflight"]["page"]
    assert report["machine"]["commit"] == "abc1234"
    assert {"torch", "triton", "driver", "runtime"} <= {*report["machine"]}
    text = (tmp_path / "report.md").read_text()
    assert "| kernel tests" in text and "### Predicted" in text


def test_a_preflight_that_finds_wrong_data_fails(gpu_check, monkeypatch, capsys, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "scripts" / "bench")
    preflight = importlib.import_module("preflight")
    sample = {"value": 1.0, "right": False, "devices": [["n0", 0]]}
    kind = {"what": "GEMM", "bytes": 0, "unit": "TFLOP/s", "expected": None, "measured": [sample]}
    said = json.dumps({"measurements": [kind], "warnings": [], "bad": {}})
    told = lambda *a, **k: subprocess.CompletedProcess(a, 0, said)  # noqa: E731
    monkeypatch.setattr(preflight.subprocess, "run", told)
    assert preflight.main(["--smoke"]) == 1
    assert "wrong data: GEMM" in capsys.readouterr().err
    assert preflight.overrides(8)[1:3] == ("parallel.tsp=2", "parallel.dp_shard=4")
    assert preflight.overrides(1)[1:3] == ("parallel.tsp=1", "parallel.dp_shard=1")


def test_a_part_that_fails_is_reported_and_the_others_run(gpu_check, tmp_path):
    fails = [sys.executable, "-c", "print('what went wrong'); raise SystemExit(3)"]
    written = tmp_path / "data.json"
    writes = [sys.executable, "-c", f"open({str(written)!r}, 'w').write('[1]')"]
    hangs = [sys.executable, "-c", "import waiting; waiting.hang()"]
    parts = [
        gpu_check.Part("first", [fails, writes], LIMIT_S, data={"found": written}),
        gpu_check.Part("second", [hangs], 0.5),
        gpu_check.Part("third", [writes], LIMIT_S, missing="pytest is not installed here"),
        gpu_check.Part("fourth", [], LIMIT_S),
        gpu_check.Part("fifth", [writes], LIMIT_S),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    outcomes = gpu_check.run_parts(parts, tmp_path / "out", {"commit": "abc"}, environment)
    assert [o.status for o in outcomes] == ["failed", "timed out", "not run", "nothing to check", "passed"]
    assert "exited with 3" in outcomes[0].reason and "what went wrong" in outcomes[0].end
    assert outcomes[0].data == {"found": [1]}  # the command after the one that failed
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [part["status"] for part in report["parts"]] == [o.status for o in outcomes]
    text = (tmp_path / "out" / "report.md").read_text()
    assert "did not end within 0.5 s" in text and "pytest is not installed here" in text


@pytest.mark.parametrize(
    ("code", "status"), [("pass", 0), ("raise SystemExit(1)", 1), ("import os; os.kill(os.getpid(), 9)", 1)]
)
def test_a_failing_part_sets_the_exit_code(gpu_check, monkeypatch, tmp_path, code, status):
    part = gpu_check.Part("only", [[sys.executable, "-c", code]], LIMIT_S)
    monkeypatch.setattr(gpu_check, "list_parts", lambda *arguments: [part])
    assert gpu_check.main(["--cpu-smoke", "--out", str(tmp_path)]) == status


def test_a_check_that_cannot_run_is_no_success(gpu_check, monkeypatch, tmp_path):
    part = gpu_check.Part("only", [["true"]], 30, missing="no pytest")
    monkeypatch.setattr(gpu_check, "list_parts", lambda *arguments: [part])
    assert gpu_check.main(["--cpu-smoke", "--out", str(tmp_path)]) == 1


def test_the_limits_add_up_to_less_than_nine_minutes(gpu_check, tmp_path):
    assert sum(part.limit_s for part in gpu_check.list_parts(tmp_path, smoke=False)) < 540
    assert [part.name for part in gpu_check.list_parts(tmp_path, smoke=False)] == PARTS


def test_every_kernel_test_is_in_a_part(gpu_check, tmp_path):
    words = {word for part in gpu_check.list_parts(tmp_path, False) for c in part.commands for word in c}
    there = [*(ROOT / "tests" / "kernels").glob("test_*.py")]
    assert {file.name for file in there if str(file) not in words} == {*gpu_check.NO_GPU_NEEDED}


@pytest.mark.skipif("TRITON_INTERPRET" not in os.environ, reason="there is a GPU")
def test_without_a_gpu_it_asks_for_the_smoke_run(gpu_check, capsys, tmp_path):
    assert gpu_check.main(["--out", str(tmp_path)]) == 2
    assert "torch sees no GPU: --cpu-smoke" in capsys.readouterr().err


WITHOUT = """
import sys
NAMES = {"transformers", "hydra", "omegaconf", "matplotlib", "tokenizers", "wandb", "xdist", "pytest_timeout"}
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in NAMES:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
import pytest
sys.exit(pytest.main([*sys.argv[1:], "--collect-only", "-q"]))
"""


def test_the_kernels_tests_need_torch_triton_and_pytest_alone():
    options = ["-c", os.devnull, f"--rootdir={ROOT}", str(ROOT / "tests" / "kernels")]
    paths = [str(ROOT / part) for part in (".", "kernels", "tests", "tests/kernels")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    found = subprocess.run(
        [sys.executable, "-c", WITHOUT, *options], capture_output=True, text=True, env=environment
    )
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-1000:]
