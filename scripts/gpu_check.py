"""Runs what needs a GPU, part by part, and reports: see scripts/gpu_check.sh."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from megatsp_kernels.registry import OPS

from megatsp.bench.machine import describe_machine
from megatsp.bench.table import align
from megatsp.parser import Parser

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests" / "kernels"
# Kernels that read other ranks' memory: on one GPU, that of simulated peers in one process.
DISTRIBUTED_OPS = ("streamed",)
DISTRIBUTED_TESTS = ("test_peers.py", "test_streamed.py")
NO_GPU_NEEDED = ("test_aot.py",)  # it compiles for chips that are not here, for minutes
RIVALS = ("liger_kernel", "flash_attn", "aiter", "apex", "transformers", "hydra-core", "pytest", "matplotlib")
FAILED = ("failed", "timed out", "not run")
_SMOKE_S = (
    600.0  # of a part without a GPU: beside a machine's other work it is slow, and only a hang is ended
)


@dataclass(frozen=True)
class Part:
    """Some of the check: commands, one after another, that get limit_s seconds together.

    missing: why it cannot run here, if so. data: JSON files that the commands write, by name.
    page: a Markdown file that they write, shown in the report.
    """

    name: str
    commands: Sequence[Sequence[str]]
    limit_s: float
    missing: str = ""
    data: dict[str, Path] = field(default_factory=dict)
    page: Path | None = None


@dataclass
class Outcome:
    """status: "passed", "nothing to check", or one of FAILED. end: of the log, where no page says more."""

    name: str
    status: str
    seconds: float = 0.0
    reason: str = ""
    end: str = ""
    data: dict[str, Any] = field(default_factory=dict)
    page: str = ""


def main(arguments: list[str]) -> int:
    """Returns 1 if a part failed, 2 if the arguments make no sense."""
    parser = Parser(
        "gpu_check.py", "Kernel tests, benchmarks and one rank's memory on one GPU; preflight on all."
    )
    add = parser.add_argument
    add("--cpu-smoke", action="store_true", help="the same program without a GPU: tiny shapes, interpreted")
    add("--out", type=Path, metavar="DIR", help="report and logs (default: $OUT, else outputs/gpu_check)")
    add("--commit", default="", metavar="HASH", help="of these sources, where there is no .git")
    try:
        given = parser.parse_args(arguments)
        if not given.cpu_smoke and not torch.cuda.is_available():
            raise ValueError("torch sees no GPU: --cpu-smoke runs the same program without one")
    except ValueError as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return 2
    out = given.out or Path(os.environ.get("OUT") or ROOT / "outputs" / "gpu_check")
    with tempfile.TemporaryDirectory(prefix="megatsp-gpu-check-") as scratch:
        parts = list_parts(Path(scratch), given.cpu_smoke)
        machine = describe()
        if given.commit:
            machine["commit"] = given.commit
        outcomes = run_parts(parts, out, machine, environment(given.cpu_smoke))
    print((out / "report.md").read_text())
    return 1 if any(outcome.status in FAILED for outcome in outcomes) else 0


def list_parts(scratch: Path, smoke: bool) -> list[Part]:
    """What is checked, with time limits that end it all before nine minutes."""
    python, pytest = sys.executable, _pytest(smoke)
    size, most = ["--smoke"] if smoke else [], _SMOKE_S
    unknown = "" if importlib.util.find_spec("pytest") else "pytest is not installed here"
    apart = (*DISTRIBUTED_TESTS, *NO_GPU_NEEDED)
    tests = (
        [TESTS / "test_swiglu.py"]
        if smoke
        else [f for f in sorted(TESTS.glob("test_*.py")) if f.name not in apart]
    )
    among = [TESTS / name for name in DISTRIBUTED_TESTS[: 1 if smoke else None] if (TESTS / name).exists()]

    def bench(ops: Sequence[str], name: str, *more: str) -> list[str]:
        files = ["--json", str(scratch / f"{name}.json"), "--markdown", str(scratch / f"{name}.md")]
        return [python, "scripts/bench/kernels.py", "--op", *ops, *files, *size, *more]

    def files(name: str) -> dict[str, Any]:
        return dict(data={name: scratch / f"{name}.json"}, page=scratch / f"{name}.md")

    alone = [op for op in OPS if op not in DISTRIBUTED_OPS]
    others = [op for op in OPS if op in DISTRIBUTED_OPS]
    memory = [python, "scripts/bench/one_rank.py", "--json", str(scratch / "memory.json"), *size]
    preflight = [python, "scripts/bench/preflight.py", "--json", str(scratch / "preflight.json"), *size]
    preflight += ["--markdown", str(scratch / "preflight.md")]
    no_hydra = "" if importlib.util.find_spec("hydra") else "hydra-core is not installed here"
    return [
        Part("kernel tests", [[*pytest, *map(str, tests)]], most if smoke else 215, unknown),
        Part("benchmarks", [bench(alone, "benchmarks")], most if smoke else 115, **files("benchmarks")),
        Part(
            "distributed kernels",
            [
                *([[*pytest, *map(str, among)]] if among else []),
                *([bench(others, "streamed")] if others else []),
            ],
            most if smoke else 80,
            unknown if among else "",
            **files("streamed"),
        ),
        Part(
            "memory of one rank",
            [memory],
            most if smoke else 75,
            data={"memory": scratch / "memory.json"},
        ),
        Part("preflight", [preflight], most if smoke else 50, no_hydra, **files("preflight")),
    ]


def _pytest(smoke: bool) -> list[str]:
    """Without pyproject's settings: their plugins may be missing, and other versions warn of other things."""
    command = [sys.executable, "-m", "pytest", "-v", "-c", os.devnull, f"--rootdir={ROOT}"]
    command += ["-p", "no:cacheprovider", "--continue-on-collection-errors"]
    if importlib.util.find_spec("xdist") and torch.cuda.is_available():
        command += ["-n", "8"]  # compiling takes most of the time, and a core each
    if importlib.util.find_spec("pytest_timeout"):
        limit_s = _SMOKE_S if smoke else 60
        command += [
            f"--timeout={limit_s:g}",
            "--timeout-method=thread",
        ]  # a kernel that hangs answers no signal
    return command


def environment(smoke: bool) -> dict[str, str]:
    """Of the parts' processes."""
    paths = [
        str(ROOT),
        str(ROOT / "kernels"),
        str(ROOT / "tests"),
        str(TESTS),
        os.environ.get("PYTHONPATH", ""),
    ]
    found = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    found.pop("TRITON_INTERPRET", None)
    return {**found, "TRITON_INTERPRET": "1"} if smoke else found


def run_parts(
    parts: Sequence[Part], out: Path, machine: dict[str, str], environment: dict[str, str]
) -> list[Outcome]:
    """Runs the parts, whatever becomes of the ones before; writes report.md and report.json after each."""
    out.mkdir(parents=True, exist_ok=True)
    outcomes = [Outcome(part.name, "not run", reason="the check ended before it") for part in parts]
    for index, part in enumerate(parts):
        print(f"gpu_check: {part.name} (at most {part.limit_s:.0f} s)", file=sys.stderr, flush=True)
        outcomes[index] = run_part(part, out / f"{part.name.replace(' ', '_')}.log", environment)
        document = {"machine": machine, "parts": [asdict(outcome) for outcome in outcomes]}
        (out / "report.json").write_text(json.dumps(document, indent=1))
        (out / "report.md").write_text(render(outcomes, machine))
    return outcomes


def run_part(part: Part, log: Path, environment: dict[str, str]) -> Outcome:
    """Every command, also after one that failed; what they write is read, however they end."""
    if part.missing:
        return Outcome(part.name, "not run", reason=part.missing)
    if not part.commands:
        return Outcome(part.name, "nothing to check", reason="no such kernel is listed in registry.OPS")
    began, wrong, status = time.monotonic(), [], "passed"
    with log.open("w") as file:
        for command in part.commands:
            left = part.limit_s - (time.monotonic() - began)
            code = _run(command, left, file, environment)
            if code is None:
                status = "timed out"
                wrong.append(f"{_short(command)} did not end within {part.limit_s:g} s")
            elif code:
                status = "failed" if status == "passed" else status
                wrong.append(f"{_short(command)} exited with {code}")
    seconds = time.monotonic() - began
    data = {name: json.loads(path.read_text()) for name, path in part.data.items() if path.exists()}
    page = part.page.read_text() if part.page and part.page.exists() else ""
    text = log.read_text(errors="replace")
    end = text[-4000:] if wrong else "" if page else text[-1200:]
    return Outcome(part.name, status, seconds, "; ".join(wrong), end, data, page)


def _run(command: Sequence[str], limit_s: float, log: Any, environment: dict[str, str]) -> int | None:
    """The exit code; None if it took too long, and then it and what it started are killed."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        return process.wait(max(limit_s, 0.0))
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _short(command: Sequence[str]) -> str:
    """What a command is, without interpreter and files."""
    words = [word for word in command[1:] if not word.startswith("-")]
    return "pytest" if "pytest" in words else Path(words[0]).name if words else Path(command[0]).name


def describe() -> dict[str, str]:
    """Machine, GPU, driver, versions, commit, and which rivals are here."""
    found = describe_machine()
    for name in ("triton", *RIVALS):
        try:
            found[name] = version(name.replace("_", "-"))
        except PackageNotFoundError:
            found[name] = "not installed"
    runtimes = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip}
    found["runtime"] = next((f"{name} {number}" for name, number in runtimes.items() if number), "CPU")
    found["driver"] = _driver()
    return found


def _driver() -> str:
    queries = (
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        ["rocm-smi", "--showdriverversion", "--csv"],
    )
    for query in queries:
        if shutil.which(query[0]):
            try:
                answer = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.split()
            except subprocess.TimeoutExpired:
                continue
            if answer:
                return answer[-1]
    return "none found"


def render(outcomes: Sequence[Outcome], machine: dict[str, str]) -> str:
    """The report as Markdown."""
    kind = machine.get("gpus", "no GPU: interpreted at tiny shapes, so times mean nothing")
    told = "\n".join(f"- {name}: {value}" for name, value in machine.items())
    lines = [[o.name, f"{o.seconds:.0f}", o.status, o.reason] for o in outcomes]
    table = align(["part", "seconds", "status", "note"], lines)
    parts = [f"# GPU check\n\n{kind}\n\n{table}\n\n{told}\n"]
    for outcome in outcomes:
        parts.append(f"## {outcome.name}\n")
        if outcome.end:
            parts.append(f"```\n{outcome.end.strip()}\n```\n")
        if outcome.page:
            parts.append(outcome.page.replace("\n## ", "\n### ").replace("# ", "### ", 1))
    return "\n".join(parts)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
