"""Loading and converting a checkpoint of a billion parameters, beside transformers' own load and save.

    python scripts/bench/convert.py --output docs/benchmarks/convert.md   # minutes; 10 GB of disk
    python scripts/bench/convert.py --smoke                               # seconds: tries the program

Every measurement is a process of its own, those of ours and theirs in turn.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from megatsp.bench.machine import describe_machine
from megatsp.parser import Parser

# The shapes of Llama 3.2 1B.
LLAMA_1B = dict(
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
)
SMOKE = LLAMA_1B | dict(
    vocab_size=1001, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=32,
)  # fmt: skip
# What is compared: ours, theirs.
CONTESTS = {
    "load in fp32": ("load_fp32", "from_pretrained_fp32"),
    "load in bf16": ("load_bf16", "from_pretrained_bf16"),
    "convert import": ("import", "load_save"),
    "convert export": ("export", "load_save"),
}
CHECKED = {"convert import, checked": "import_checked", "convert export, checked": "export_checked"}


def load(folder: Path, dtype: torch.dtype) -> Callable[[], Any]:
    """Ours: opening, and reading into one rank's parameters."""
    import torch.distributed as dist

    from megatsp.axes import Axes, join
    from megatsp.hf.checkpoint import open_checkpoint
    from megatsp.hf.load import load_weights
    from megatsp.model.gpt import GPT
    from megatsp.model.parallelize import shard
    from megatsp.schema import ModelConfig, ParallelConfig

    device = torch.device("cpu")
    join(device, 600, store=dist.HashStore(), rank=0, world_size=1)
    axes = Axes.build(parallel := ParallelConfig(dp_shard=1), device)
    with torch.device("meta"):
        shard(GPT(ModelConfig()), parallel, axes)  # what torch imports when it is first used

    def work() -> Any:
        checkpoint = open_checkpoint(str(folder))
        with torch.device("meta"):
            gpt = GPT(checkpoint.model)
        shard(gpt, parallel, axes)
        gpt.to(dtype).to_empty(device=device)
        load_weights(checkpoint, gpt)
        return [parameter.to_local() for parameter in gpt.parameters()]

    return work


def from_pretrained(folder: Path, dtype: torch.dtype) -> Callable[[], Any]:
    from transformers import LlamaForCausalLM

    return lambda: list(LlamaForCausalLM.from_pretrained(folder, dtype=dtype).parameters())


def load_save(folder: Path) -> Callable[[], Any]:
    from transformers import LlamaForCausalLM

    def work() -> None:
        model = LlamaForCausalLM.from_pretrained(folder, dtype="auto")
        model.save_pretrained(folder.parent / "theirs")
        for path in (folder.parent / "theirs").iterdir():  # as ours are
            with path.open("rb") as file:
                os.fsync(file.fileno())

    return work


def convert(folder: Path, back: bool, verify: bool) -> Callable[[], Any]:
    """One direction; `back` finds what the other one left."""
    import transformers.models.llama.modeling_llama  # noqa: F401  # which the check imports

    from megatsp.hf.command import checkpoint_of
    from megatsp.hf.export import export
    from megatsp.hf.imported import import_run

    run = folder.parent / "run"
    if back:
        return lambda: export(checkpoint_of(run), folder.parent / "ours", verify=verify)
    return lambda: import_run(str(folder), run, "byte", verify)


TASKS: dict[str, Callable[[Path], Callable[[], Any]]] = {
    "load_fp32": lambda folder: load(folder, torch.float32),
    "load_bf16": lambda folder: load(folder, torch.bfloat16),
    "from_pretrained_fp32": lambda folder: from_pretrained(folder, torch.float32),
    "from_pretrained_bf16": lambda folder: from_pretrained(folder, torch.bfloat16),
    "import": lambda folder: convert(folder, back=False, verify=False),
    "export": lambda folder: convert(folder, back=True, verify=False),
    "load_save": load_save,
    "import_checked": lambda folder: convert(folder, back=False, verify=True),
    "export_checked": lambda folder: convert(folder, back=True, verify=True),
}


class _Peak(threading.Thread):
    """Samples this process's anonymous memory: what it cannot give back, as mapped files can."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.first = self.most = memory("RssAnon")

    def run(self) -> None:
        while True:
            self.most = max(self.most, memory("RssAnon"))
            time.sleep(0.005)


def memory(key: str) -> int:
    """Bytes of this process: RssAnon, VmRSS, or VmHWM, the most that VmRSS was."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def child(task: str, folder: Path) -> None:
    """Prints one measurement as JSON."""
    work = TASKS[task](folder)
    peak = _Peak()
    peak.start()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    resident = memory("VmRSS")
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    for tensor in (
        result if isinstance(result, list) else ()
    ):  # where a tensor is a view of a file, it is read now
        tensor.detach().view(-1).view(torch.int16)[::1024].sum()
    found = {
        "seconds": time.perf_counter() - wall,
        "cpu_s": time.process_time() - cpu,
        "anonymous_bytes": peak.most - peak.first,
        "resident_bytes": memory("VmHWM") - resident,
    }
    print("RESULT " + json.dumps(found), flush=True)


def measure(task: str, folder: Path) -> dict[str, float]:
    for name in ("ours", "theirs", *(["run"] if task.startswith("import") else [])):
        shutil.rmtree(folder.parent / name, ignore_errors=True)
    done = subprocess.run(
        [sys.executable, __file__, "--child", task, "--folder", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            found: dict[str, float] = json.loads(line.removeprefix("RESULT "))
            return found
    raise RuntimeError(f"{task} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def make(folder: Path, sizes: dict[str, Any]) -> int:
    """Writes the checkpoint; returns the bytes of its weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**sizes)).to(torch.bfloat16)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.uniform_(parameter, -0.04, 0.04)
    model.tie_weights()
    model.save_pretrained(folder)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def page(results: dict[str, list[dict[str, float]]], num_bytes: int, repeats: int) -> str:
    """The report, in Markdown."""

    def row(label: str, task: str, against: str = "") -> str:
        runs = results[task]
        values = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        cells = [label, f"{values['seconds']:.2f}", f"{values['cpu_s']:.2f}"]
        if against:
            ratios = [
                statistics.median(
                    a[key] / b[key] for a, b in zip(runs, results[against], strict=True) if b[key]
                )
                for key in ("seconds", "cpu_s")
            ]
            cells += [f"{ratio:.2f}" for ratio in ratios]
        else:
            cells += ["", ""]
        cells += [f"{values[key] / num_bytes:.2f}" for key in ("anonymous_bytes", "resident_bytes")]
        return "| " + " | ".join(cells) + " |"

    lines = []
    for label, (ours, theirs) in CONTESTS.items():
        lines += [row(f"{label}: megatsp", ours, theirs), row(f"{label}: transformers", theirs)]
    lines += [row(f"{label}: megatsp", task) for label, task in CHECKED.items()]
    machine = {**describe_machine(), **{name: version(name) for name in ("transformers", "safetensors")}}
    head = (
        "what", "seconds", "processor s", "seconds against theirs", "processor s against theirs",
        "anonymous memory", "resident memory",
    )  # fmt: skip
    return f"""# Converting: time and memory beside transformers

**Measured** by `python scripts/bench/convert.py`: a checkpoint of Llama 3.2 1B's shapes with random weights,
bf16, {num_bytes / 1e9:.2f} GB in one file, page cache warm; medians of {repeats} in fresh processes, ours and
theirs in turn; imports of modules are not counted. Against theirs: the median of the runs' ratios. On a
virtual machine the first touch of memory may take longer than what is done with it: seconds vary.

Load: `open_checkpoint` and `load_weights` into the parameters of one rank; `from_pretrained`. Afterwards a
number of each page is read, so that what is only mapped is loaded too; in bf16 transformers maps the file and
copies nothing, while ours are parameters that can be trained. Convert: `megatsp convert import` or `export`,
each of which reads the weights and writes them, brings them to the disk and (export) hashes them, without and
with the check of logits; against `from_pretrained`, `save_pretrained` and fsync of its files. Memory:
growth during the work, in parts of the checkpoint's size. Anonymous memory is what a process needs; resident
memory counts pages of mapped files too, which the system takes back when it needs them.

What an export takes beyond an import is SHA-256, which a thread computes beside the writing: on cores that
are taken by other programs it is not beside it. The check is two forward passes (ours, theirs) of 128
tokens in fp32.

| {" | ".join(head)} |
| ---- |{" ---: |" * (len(head) - 1)}
{chr(10).join(lines)}

Measured: {", ".join(f"{name} {value}" for name, value in machine.items())}.
"""


def main(arguments: list[str]) -> int:
    """Returns 0; the page goes to the terminal too."""
    parser = Parser("convert.py", "Measures loading and converting.")
    parser.add_argument("--output", type=Path, metavar="PAGE.md", help="write a page")
    parser.add_argument("--folder", type=Path, help="for temporary files: 10 GB (default: the system's)")
    parser.add_argument("--smoke", action="store_true", help="a tiny checkpoint, once: tries the program")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="(default: 3)")
    parser.add_argument("--child", choices=TASKS, help="one measurement, on the checkpoint in --folder")
    given = parser.parse_args(arguments)
    if given.child:
        child(given.child, given.folder)
        return 0
    repeats = 1 if given.smoke else max(1, given.repeats)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in TASKS}
    with tempfile.TemporaryDirectory(prefix="megatsp-bench-", dir=given.folder) as temporary:
        folder = Path(temporary) / "hf"
        num_bytes = make(folder, SMOKE if given.smoke else LLAMA_1B)
        measure("load_fp32", folder)  # warms what is warmed by reading
        for _ in range(repeats):
            for name in results:
                results[name].append(measure(name, folder))
                print(name, results[name][-1], file=sys.stderr, flush=True)
    text = page(results, num_bytes, repeats)
    print(text)
    if given.output:
        given.output.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
