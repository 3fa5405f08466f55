"""The memory of one rank of eight, 7B at 128K tokens with tsp=8: as the GPU has it, beside the simulation.

    python scripts/bench/one_rank.py --json memory.json     # on one GPU; peers are not there, see docs/bench.md
    python scripts/bench/one_rank.py --smoke                # a tiny model on the CPU

The same as `megatsp bench --one-rank`, without Hydra: a machine that lends a GPU may have torch alone.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from megatsp.bench.machine import describe_machine
from megatsp.bench.memory import StepMemory, one_rank_memory, simulated_memory
from megatsp.bench.results import Report
from megatsp.bench.table import PARTS, align
from megatsp.parser import Parser
from megatsp.schema import Config, LaunchConfig, ModelConfig, ParallelConfig, TrainerConfig
from megatsp.validate import validate

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "configs" / "model" / "gpt_7b.yaml"
SIMULATED = (
    ROOT / "docs" / "benchmarks" / "results" / "seven_selective.json"
)  # to simulate again takes a minute
RANK = 0  # rank 7 is simulated within 0.11 GB of it
GB = 10**9


def main(arguments: list[str]) -> int:
    """Returns 2 if the arguments make no sense."""
    parser = Parser("one_rank.py", "One rank's memory in a training step of 7B at 128K tokens, tsp=8.")
    parser.add_argument("--smoke", action="store_true", help="a tiny model with tsp=2 on the CPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything")
    try:
        given = parser.parse_args(arguments)
        if not given.smoke and not torch.cuda.is_available():
            raise ValueError("one rank of 7B needs a GPU, and torch sees none (--smoke tries the program)")
    except ValueError as error:
        print(f"one_rank: {error}", file=sys.stderr)
        return 2
    ranks, config = (2, tiny()) if given.smoke else (8, seven())
    config = validate(config, ranks)
    device = torch.device(config.launch.device)
    report: dict[str, Any] = {
        "machine": describe_machine(),
        "ranks": ranks,
        "seq_length": config.trainer.seq_length,
    }
    kinds: dict[str, Callable[[], StepMemory]] = {
        "measured": lambda: one_rank_memory(config, ranks, RANK, device),
        "simulated": lambda: simulated_memory(config, ranks, RANK) if given.smoke else simulated_before(),
    }
    found: dict[str, StepMemory] = {}
    for kind, run in kinds.items():
        began = time.monotonic()
        found[kind] = run()
        report[kind] = {**asdict(found[kind]), "seconds": time.monotonic() - began}
        if given.json:
            given.json.write_text(json.dumps(report, indent=1))
    print(render(found, ranks, config))
    return 0


def seven() -> Config:
    """The paper's setting, as `scripts/bench_docs.sh seven` has it: selective recompute, one sequence."""
    model = ModelConfig(**yaml.safe_load(MODEL.read_text()))
    trainer = replace(
        TrainerConfig(),
        dtype="bf16",
        recompute_granularity="selective",
        seq_length=131072,
        micro_batch_size=1,
        global_batch_size=1,
    )
    return Config(
        model=model, trainer=trainer, parallel=ParallelConfig(tsp=8), launch=LaunchConfig(device="cuda")
    )


def simulated_before() -> StepMemory:
    """What `scripts/bench_docs.sh seven` found for rank 0 of `seven()`."""
    report = Report.from_json(SIMULATED.read_text())
    point = {"trainer.seq_length": "131072"}
    return next(
        row.memory for row in report.rows if row.scheme == "tsp" and row.point == point and row.memory
    )


def tiny() -> Config:
    """gpt_tiny, which trains anywhere."""
    trainer = replace(TrainerConfig(), dtype="fp32", seq_length=64, micro_batch_size=1, global_batch_size=1)
    return Config(trainer=trainer, parallel=ParallelConfig(tsp=2), launch=LaunchConfig(device="cpu"))


def render(found: dict[str, StepMemory], ranks: int, config: Config) -> str:
    """Both kinds as a table, in GB (10^9 bytes)."""
    titles = ["rank 0", "peak GB", *PARTS, "allocated"]
    lines = []
    for kind, memory in found.items():
        sizes = [memory.peak, *(getattr(memory, part) for part in PARTS), memory.allocated]
        lines.append([kind, *("" if size is None else f"{size / GB:.4g}" for size in sizes)])
    title = f"{config.trainer.seq_length:,} tokens, {ranks} ranks, {config.trainer.dtype}, recompute "
    return f"{title}{config.trainer.recompute_granularity}:\n\n{align(titles, lines)}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
