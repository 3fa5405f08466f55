"""Golden runs: what ten steps of tiny runs computed, to the bit, so that a refactoring is held to it.

A run goes through the trainer's own data, model, clipping, schedule and optimizer. On processors and a torch
like those of the record every number has the same bits; elsewhere losses and gradient norms agree to `bound`.
`scripts/golden.py` makes the records anew.
"""

import hashlib
import json
import logging
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from distributed import run_distributed
from runs import TINY, full_state, start_training, write_corpus
from tuning import prepare_chats, save_checkpoint, settings

from megatsp.compose import compose
from megatsp.schema import Config

GOLDEN = Path(__file__).parent / "golden"
STEPS = 10
# The first step of Adam has the sign of a gradient, however small, unless epsilon is above its roundings.
COMMON = ("optimizer.lr=0.005", "optimizer.adam_eps=1e-4", "trainer.micro_batch_size=4")


@dataclass(frozen=True)
class Run:
    """Ten steps on `ranks` ranks. tunes: adapters of a Hugging Face checkpoint, on conversations.

    bound: relative difference from the record on other processors.
    """

    ranks: int
    settings: Sequence[str] = ()
    tunes: bool = False
    bound: float = 1e-6

    def config(self, folder: Path) -> Config:
        """Its configuration; `folder` holds what `prepare` wrote."""
        where = f"data.path={folder}/corpus", f"output_dir={folder}", f"launch.nproc={self.ranks}"
        if self.tunes:
            return compose(settings(folder, *where[2:], *COMMON, *self.settings), primary="sft")
        return compose([*TINY, *where, *COMMON, *self.settings])


TSP2 = "parallel.tsp=2"
# bf16: roundings that differ by the order of a sum are larger, and ten steps amplify them.
RUNS = {
    "dense": Run(1),
    "hidden": Run(4, ["parallel.tsp=4", "parallel.mlp_buckets=3"]),
    "owner": Run(4, ["parallel.tsp=4", "parallel.tsp_layout=owner", "parallel.kv_exchange=ring"]),
    "tp": Run(2, ["parallel=tp"]),
    "cp_ring": Run(2, ["parallel=cp_ring"]),
    "cp_ulysses": Run(2, ["parallel=cp_ulysses"]),
    "cp_tsp": Run(4, ["parallel=cp_tsp"]),
    "tp_cp": Run(4, ["parallel=tp_cp"]),
    "fsdp_cp": Run(2, ["parallel=fsdp_cp"]),
    "hsdp": Run(4, ["parallel=hsdp", "trainer.micro_batch_size=1"]),
    "lora": Run(2, [TSP2, "finetune.lora_rank=3", "finetune.lora_alpha=5"], tunes=True),
    "packed": Run(2, [TSP2, "data.packing=best_fit"]),
    "bf16": Run(2, [TSP2, "trainer.dtype=bf16"], bound=1e-2),
    "accumulation": Run(2, [TSP2, "trainer.micro_batch_size=1"]),
    "recompute": Run(2, [TSP2, "trainer.recompute_granularity=full"]),
}


@dataclass(frozen=True)
class Record:
    """What a run computed.

    made_on: processor and torch. state: digest of all weights and moments after the last step, gathered.
    """

    made_on: str
    losses: list[float]
    gradient_norms: list[float]
    state: str
    run: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, name: str) -> "Record":
        return cls(**json.loads((GOLDEN / f"{name}.json").read_text()))

    def write(self, name: str) -> None:
        (GOLDEN / f"{name}.json").write_text(json.dumps(asdict(self), indent=1) + "\n")


def this_machine() -> str:
    """What the bits of a product depend on: the processor's kind, and torch with its libraries."""
    keys = ("vendor_id", "cpu family", "model", "stepping")
    try:
        lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
        found = {key.strip(): value.strip() for key, _, value in reversed(lines)}
        processor = ", ".join(f"{key} {found[key]}" for key in keys if key in found)
    except FileNotFoundError:
        processor = platform.processor()
    return (
        f"{processor or platform.machine()}; {torch.backends.cpu.get_cpu_capability()}; {torch.__version__}"
    )


def prepare(folder: Path) -> Path:
    """Writes the data and the checkpoint that runs read."""
    write_corpus(folder / "corpus")
    prepare_chats(folder)
    save_checkpoint(folder / "hf", folder / "tokenizer")
    return folder


def records(folder: Path, names: Sequence[str]) -> dict[str, Record]:
    """Trains these runs; those of as many ranks share them."""
    found: dict[str, Record] = {}
    for ranks in sorted({RUNS[name].ranks for name in names}):
        group = [name for name in names if RUNS[name].ranks == ranks]
        made = run_distributed(_train, ranks, [RUNS[name].config(folder) for name in group])[0]
        for name, (losses, norms, state) in zip(group, made, strict=True):
            run = {"ranks": ranks, "settings": list(RUNS[name].settings)}
            found[name] = Record(this_machine(), losses, norms, state, run)
    return {name: found[name] for name in names}


def difference(actual: Record, golden: Record, bound: float) -> str:
    """Where a run first leaves its record, in words; "" if nowhere. bound: 0 asks for the same bits."""
    for step in range(STEPS):
        for what in ("losses", "gradient_norms"):
            a, b = getattr(actual, what)[step], getattr(golden, what)[step]
            if not abs(a - b) <= bound * abs(b):
                return f"{what}[{step}] is {a!r}, and was {b!r}"
    if not bound and actual.state != golden.state:
        return (
            "all losses and gradient norms have the bits they had; weights or moments after the last step not"
        )
    return ""


def _train(configs: Sequence[Config]) -> list[tuple[list[float], list[float], str]]:
    """On a rank: each run's losses and gradient norms, and the digest of its last state."""
    found = []
    # It says that torch gathers in two steps, which is for the digest alone.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    for config in configs:
        training = start_training(config)
        loader = training.loader()
        results = [training.step(iteration, loader) for iteration in range(1, STEPS + 1)]
        loader.close()
        digest = hashlib.sha256()
        for name, tensor in sorted(full_state(training).items()):
            digest.update(f"{name} {tensor.dtype} {[*tensor.shape]}".encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        training.gpt.engine.close()
        found.append(([r.loss for r in results], [r.grad_norm for r in results], digest.hexdigest()))
    return found
