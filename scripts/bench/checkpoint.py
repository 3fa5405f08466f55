"""Saving and loading a state of a gigabyte, beside torch's own distributed checkpoint.

    python scripts/bench/checkpoint.py --output docs/benchmarks/checkpoint.md   # minutes; 5 GB of disk
    python scripts/bench/checkpoint.py --smoke                                  # seconds: tries the program

Two gloo ranks hold weights and the two moments of AdamW as DTensors. All programs save the same state to the
same disk and load it, one after the other, round after round.
"""

import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from megatsp.bench.machine import describe_machine
from megatsp.bench.ranks import run_ranks
from megatsp.checkpoint import store
from megatsp.checkpoint.saver import Saved, Saver
from megatsp.checkpoint.state import RunState
from megatsp.parser import Parser
from megatsp.schema import CheckpointConfig

RANKS = 2
# Layers, h, F, V: 103 million parameters, so 1.24 GB with two moments.
SIZES, SMOKE = (6, 1024, 2816, 24576), (1, 64, 96, 128)
MOMENTS = ("exp_avg", "exp_avg_sq")
# What is compared with what: ours, theirs.
SAVES = {
    "megatsp, async_save=false": "torch dcp.save",
    "megatsp, async_save=true": "torch dcp.async_save",
}
KEPT = "torch dcp.async_save, one stager for all"
LOADS = ("megatsp, verify=checksums", "megatsp, verify=sizes")
TORCH_LOAD = "torch dcp.load"

Times = dict[str, float]


class Weights(nn.Module):
    """Parameters of a transformer's shapes, each sharded over its first dimension."""

    def __init__(self, layers: int, h: int, ffn: int, vocabulary: int) -> None:
        super().__init__()
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        shapes = {"embedding": (vocabulary, h), "norm": (h,)}
        for layer in range(layers):
            for name, shape in {
                **{f"{name}_proj": (h, h) for name in "qkvo"},
                **{"gate_proj": (ffn, h), "up_proj": (ffn, h), "down_proj": (h, ffn), "norm": (h,)},
            }.items():
                shapes[f"layer{layer}_{name}"] = shape
        for name, (rows, *rest) in shapes.items():
            local = torch.randn(rows // dist.get_world_size(), *rest)
            self.register_parameter(name, nn.Parameter(DTensor.from_local(local, mesh, [Shard(0)])))


class Contest:
    """On a rank: the state, and every program's way to save and load it."""

    def __init__(self, folder: Path, sizes: tuple[int, ...]) -> None:
        torch.manual_seed(dist.get_rank())
        self.folder = folder
        self.model = Weights(*sizes)
        self.moments = {
            f"optimizer.{moment}.{name}": parameter.detach().square()
            for moment in MOMENTS
            for name, parameter in self.model.named_parameters()
        }
        self.tensors = store.named_tensors(self.model, self.moments)
        self.bytes = sum(tensor.nbytes for tensor in self.tensors.values())
        self.group = dist.new_group(backend="gloo")
        self.stager = DefaultStager(StagingOptions(False, False, False, False))
        self.sync = Saver(folder, CheckpointConfig(async_save=False))
        self.background = Saver(folder, CheckpointConfig())
        self.round = 0

    def saves(self) -> dict[str, Callable[[], Times]]:
        return {
            "torch dcp.save": self._torch,
            "megatsp, async_save=false": lambda: self._ours(self.sync),
            "torch dcp.async_save": lambda: self._torch_async(None),
            KEPT: lambda: self._torch_async(self.stager),
            "megatsp, async_save=true": lambda: self._ours(self.background),
        }

    def _torch(self) -> Times:
        since = time.perf_counter()
        dcp.save(self.tensors, checkpoint_id=self.folder / "torch")
        seconds = time.perf_counter() - since
        return {"stall": seconds, "total": seconds}

    def _torch_async(self, stager: DefaultStager | None) -> Times:
        since = time.perf_counter()
        saving: Any = dcp.async_save(
            self.tensors,
            checkpoint_id=self.folder / "torch",
            process_group=self.group,
            async_stager=stager,
        )
        stall = time.perf_counter() - since
        saving.result()
        return {"stall": stall, "total": time.perf_counter() - since}

    def _ours(self, saver: Saver) -> Times:
        since = time.perf_counter()
        saver.save(RunState(iteration=self.round), self.tensors, {}, None)
        stall = time.perf_counter() - since
        while not saver.finished:
            time.sleep(0.002)
        total = time.perf_counter() - since
        outcome = saver.collect()
        assert isinstance(outcome, Saved), outcome
        return {"stall": stall, "total": total}

    def prepare_loads(self) -> None:
        """Saves what they read."""
        self.clear()
        self._torch()
        self._ours(self.sync)

    def loads(self) -> dict[str, Callable[[], Times]]:
        return {
            "megatsp, verify=checksums": lambda: self._load("checksums"),
            TORCH_LOAD: self._torch_load,
            "megatsp, verify=sizes": lambda: self._load("sizes"),
        }

    def _load(self, verify: str) -> Times:
        since = time.perf_counter()
        store.load(self.folder / f"iter_{self.round:07d}", self.model, self.moments, verify)
        return {"load": time.perf_counter() - since}

    def _torch_load(self) -> Times:
        since = time.perf_counter()
        dcp.load(dict(self.tensors), checkpoint_id=self.folder / "torch")
        return {"load": time.perf_counter() - since}

    def clear(self) -> None:
        """No file of a save before, and nothing on its way to the disk."""
        dist.barrier()
        if dist.get_rank() == 0:
            for path in self.folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            os.sync()
        dist.barrier()

    def forget(self) -> None:
        """Takes the files out of the page cache."""
        dist.barrier()
        if dist.get_rank() == 0:
            for path in self.folder.rglob("*"):
                if path.is_file():
                    with path.open("rb") as file:
                        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        dist.barrier()

    def close(self) -> None:
        self.stager.close()
        self.sync.close()
        self.background.close()


def measure(folder: Path, sizes: tuple[int, ...], repeats: int) -> tuple[int, dict[str, list[Times]]]:
    """On a rank: bytes of the state, and every program's times in seconds, the slowest rank's, by round.

    The first round, in which buffers are made and modules imported, is not counted.
    """
    contest = Contest(folder, sizes)
    found: dict[str, list[Times]] = {}

    def take(name: str, work: Callable[[], Times], counts: bool) -> None:
        dist.barrier()
        times = work()
        slowest = torch.tensor(list(times.values()), dtype=torch.float64)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        if counts:
            found.setdefault(name, []).append(dict(zip(times, slowest.tolist(), strict=True)))
        if dist.get_rank() == 0 and sys.stderr.isatty():
            print(name, slowest.tolist(), file=sys.stderr, flush=True)

    before = {name: tensor.to_local().clone() for name, tensor in contest.tensors.items()}
    for contest.round in range(repeats + 1):
        counts = contest.round > 0
        saves = list(contest.saves().items())
        first = contest.round % len(saves)
        for name, save in saves[first:] + saves[:first]:
            contest.clear()
            take(name, save, counts)
        contest.prepare_loads()
        for kind in ("cold", "warm"):
            for name, load in contest.loads().items():
                if kind == "cold":
                    contest.forget()
                poison(contest.tensors)
                take(f"{name}, {kind}", load, counts)
                for key, tensor in contest.tensors.items():
                    assert torch.equal(tensor.to_local(), before[key]), (name, key)
    contest.close()
    return contest.bytes, found


def poison(tensors: dict[str, Tensor]) -> None:
    for tensor in tensors.values():
        assert isinstance(tensor, DTensor)
        tensor.to_local().fill_(float("nan"))


def ratio(ours: list[Times], theirs: list[Times], key: str) -> str:
    return f"{statistics.median(a[key] / b[key] for a, b in zip(ours, theirs, strict=True)):.2f}"


def median(runs: list[Times], key: str) -> str:
    values = [run[key] for run in runs]
    return f"{statistics.median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


def page(num_bytes: int, found: dict[str, list[Times]], repeats: int) -> str:
    """The report, in Markdown."""
    against = {**SAVES, KEPT: ""}
    rows = []
    for name, theirs in against.items():
        for program in (name, theirs):
            if not program:
                continue
            cells = [program, *(median(found[program], key) for key in ("stall", "total"))]
            if program == name and theirs:
                cells += [ratio(found[name], found[theirs], key) for key in ("stall", "total")]
            elif program == KEPT:
                ours = found["megatsp, async_save=true"]
                cells += [f"(ours: {ratio(ours, found[KEPT], key)})" for key in ("stall", "total")]
            else:
                cells += ["", ""]
            rows.append("| " + " | ".join(cells) + " |")
    loads = []
    for name in (*LOADS, TORCH_LOAD):
        cells = [name]
        for kind in ("cold", "warm"):
            runs = found[f"{name}, {kind}"]
            own = name != TORCH_LOAD
            cells += [
                median(runs, "load"),
                ratio(runs, found[f"{TORCH_LOAD}, {kind}"], "load") if own else "",
            ]
        loads.append("| " + " | ".join(cells) + " |")
    machine = describe_machine()
    return f"""# Checkpoints: saving and loading beside torch's own

**Measured** by `python scripts/bench/checkpoint.py`: {num_bytes / 1e9:.2f} GB of fp32 weights and AdamW
moments as DTensors on {RANKS} gloo ranks of one machine; median [min, max] of {repeats} rounds, in which all
take turns, after one that is not counted. A time is the slowest rank's. Against theirs: the median of the
rounds' ratios.

## Saving

Stall: how long training stands still. Total: until the checkpoint is whole and on the disk; training does
nothing meanwhile. Before each save the files of the one before are removed and the disk is idle.

All bring every byte to the disk: torch's FileSystemWriter calls fsync for each file (sync_files=True, its
default), megatsp for each file and folder. megatsp also computes a checksum of each file (xxh3_128) while it
writes, and gives the checkpoint its name once all is there. dcp.async_save makes new buffers for each copy,
as is its default; with one stager for all saves it keeps them, as megatsp does (in brackets: megatsp,
async_save=true, against that).

| what | stall, s | total, s | stall against theirs | total against theirs |
| ---- | ---: | ---: | ---: | ---: |
{chr(10).join(rows)}

## Loading

Into tensors that are there, which are compared with what was saved. Cold: the files are taken out of the page
cache before. With verify=checksums every file is read through as well.

| what | cold, s | against dcp.load | warm, s | against dcp.load |
| ---- | ---: | ---: | ---: | ---: |
{chr(10).join(loads)}

Measured: {", ".join(f"{name} {value}" for name, value in machine.items())}.
"""


def plot(found: dict[str, list[Times]], file: Path) -> None:
    """Stall and total of saves, and load times: medians, in seconds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = [name for pair in SAVES.items() for name in pair] + [KEPT]
    for key, color in (("total", "tab:gray"), ("stall", "tab:blue")):
        widths = [statistics.median(run[key] for run in found[name]) for name in names]
        left.barh(names, widths, color=color, label=key)
    left.set_title("saving, s")
    left.legend()
    kinds = [f"{name}, {kind}" for kind in ("cold", "warm") for name in (*LOADS, TORCH_LOAD)]
    right.barh(kinds, [statistics.median(run["load"] for run in found[name]) for name in kinds])
    right.set_title("loading, s")
    for axes in (left, right):
        axes.invert_yaxis()
    figure.savefig(file, dpi=120)


def main(arguments: list[str]) -> int:
    """Returns 0; the page goes to the terminal too."""
    parser = Parser("checkpoint.py", "Measures saving and loading beside torch's distributed checkpoint.")
    parser.add_argument("--output", type=Path, metavar="PAGE.md", help="write a page, and a PNG beside it")
    parser.add_argument("--folder", type=Path, help="for temporary files: 5 GB (default: the system's)")
    parser.add_argument("--smoke", action="store_true", help="a tiny state, once: tries the program")
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="rounds (default: 7)")
    given = parser.parse_args(arguments)
    repeats, sizes = (1, SMOKE) if given.smoke else (max(1, given.repeats), SIZES)
    with tempfile.TemporaryDirectory(prefix="megatsp-bench-", dir=given.folder) as temporary:
        num_bytes, found = run_ranks(measure, RANKS, Path(temporary), sizes, repeats, timeout_s=3600)[0]
    text = page(num_bytes, found, repeats)
    print(text)
    if given.output:
        picture = given.output.with_suffix(".png")
        plot(found, picture)
        given.output.write_text(f"{text}\n[As a picture]({picture.name}).\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
