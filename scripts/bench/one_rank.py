"""The memory of one rank of eight, 7B at 128K tokens with tsp=8: as the GPU has it, beside the simulation.

    python scripts/bench/one_rank.py --json memory.json     # on one GPU: its peers are not there
    python scripts/bench/one_rank.py --smoke                # a tiny model on the CPU

The same as `megatsp bench --one-rank`, without Hydra: a machine that lends a GPU may have torch alone.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from megatsp.bench.memory import StepMemory, one_rank_memory, simulated_memory
from megatsp.bench.results import Report, Row
from megatsp.bench.table import PARTS, align
from megatsp.parser import Parser
from megatsp.schema import (
    Config,
    LaunchConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RotaryScaling,
    TrainerConfig,
)
from megatsp.validate import validate

# Its command: `bash scripts/bench_docs.sh seven`. To simulate again takes a minute, which a GPU would wait.
STORED = Path(__file__).resolve().parents[2] / "docs" / "benchmarks" / "results" / "seven_selective.json"
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
    ranks = 2 if given.smoke else 8
    config = validate(tiny() if given.smoke else from_row(seven()), ranks)
    device = torch.device(config.launch.device)
    kinds: dict[str, Callable[[], StepMemory | None]] = {
        "measured": lambda: one_rank_memory(config, ranks, RANK, device),
        "simulated": lambda: simulated_memory(config, ranks, RANK) if given.smoke else seven().memory,
    }
    report: dict[str, Any] = {"ranks": ranks, "seq_length": config.trainer.seq_length}
    found: dict[str, StepMemory] = {}
    for kind, run in kinds.items():
        memory = run()
        assert memory, "the stored row has no memory"
        found[kind] = memory
        report[kind] = asdict(memory)
        if given.json:
            given.json.write_text(json.dumps(report, indent=1))
    print(render(found, ranks, config))
    return 0


def seven() -> Row:
    """What `scripts/bench_docs.sh seven` found for rank 0: selective recompute, one sequence."""
    report = Report.from_json(STORED.read_text())
    point = {"trainer.seq_length": "131072"}
    return next(row for row in report.rows if row.scheme == "tsp" and row.point == point)


def from_row(row: Row) -> Config:
    """The row's configuration, as far as a training step reads it."""
    groups = row.config
    scaling = RotaryScaling(**groups["model"]["rotary_scaling"])
    return Config(
        model=ModelConfig(**{**groups["model"], "rotary_scaling": scaling}),
        parallel=ParallelConfig(**groups["parallel"]),
        optimizer=OptimizerConfig(**groups["optimizer"]),
        trainer=TrainerConfig(**groups["trainer"]),
        launch=LaunchConfig(**groups["launch"]),
    )


def tiny() -> Config:
    """gpt_tiny, which trains anywhere."""
    trainer = TrainerConfig(seq_length=64, micro_batch_size=1, global_batch_size=1)
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
