"""Tiny training runs for tests: a corpus made on the spot, a two-layer model, ranks that train it."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from distributed import run_distributed
from torch.distributed.tensor import DTensor

from megatsp import launcher
from megatsp.compose import compose
from megatsp.data.indexed import IndexedWriter
from megatsp.data.tokenizer import ByteTokenizer
from megatsp.schema import Config
from megatsp.training.logs import read_metrics
from megatsp.training.run import Training
from megatsp.training.stopping import Stopper
from megatsp.validate import validate

ROOT = Path(__file__).resolve().parents[1]
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_ID", "SLURM_NTASKS", launcher.LAUNCHER_PID)
WORDS = (
    "the", "sun", "rose", "over", "a", "quiet", "harbour", "and", "nobody", "spoke", "until", "ships", "came",
    "home",
)  # fmt: skip

# h 32, T 32, FFN width and vocabulary divisible by nothing; ten steps of four samples.
TINY = (
    "model.num_layers=2", "model.hidden_size=32", "model.ffn_hidden_size=45", "model.kv_channels=8",
    "trainer.seq_length=32", "trainer.micro_batch_size=2", "trainer.global_batch_size=4",
    "trainer.train_iters=10", "trainer.eval_interval=0", "trainer.eval_iters=2", "data.valid_fraction=0.25",
    "optimizer.lr=0.01", "scheduler.lr_warmup_iters=2", "scheduler.min_lr=0.001",
    "logging.log_interval=1", "logging.wandb=disabled", "checkpoint.save_interval=0", "launch.device=cpu",
    "data.num_workers=0",
)  # fmt: skip


def write_corpus(prefix: Path, documents: int = 24) -> Path:
    """Documents of 5 to 60 words, some shorter than a sample and some longer; returns the prefix."""
    random = np.random.RandomState(0)
    tokenizer = ByteTokenizer()
    with IndexedWriter(prefix, tokenizer) as writer:
        for i in range(documents):
            text = " ".join(random.choice(WORDS, random.randint(5, 60)))
            writer.add(f"doc{i}", tokenizer.encode(text), len(text))
    return prefix


def overrides(prefix: Path, output_dir: Path, *more: str) -> list[str]:
    """The arguments of `megatsp train` for a tiny run."""
    return [*TINY, f"data.path={prefix}", f"output_dir={output_dir}", *more]


def train_on_ranks(world_size: int, *runs: Sequence[str]) -> list[list[dict[str, Any]]]:
    """Runs trainings, one after the other, on the same ranks; returns each one's metrics.jsonl."""
    configs = [compose(list(run)) for run in runs]
    run_distributed(_train, world_size, configs)
    return [read_metrics(Path(c.output_dir) / c.name / "metrics.jsonl") for c in configs]


def start_training(config: Config) -> Training:
    """On a rank: the training of a configuration, before its first step."""
    return Training(validate(config, dist.get_world_size()), torch.device("cpu"))


def _train(configs: Sequence[Config]) -> None:
    for config in configs:
        start_training(config).run()


class StopIf(Stopper):
    """Is asked to end by SIGTERM on this rank, as soon as `condition` holds."""

    def __init__(self, condition: Callable[[], bool]) -> None:
        super().__init__()
        self._condition = condition

    def asked(self) -> bool:
        if not self.heard and self._condition():
            self.heard.append("SIGTERM")
        return super().asked()


def full_state(training: Training) -> dict[str, torch.Tensor]:
    """On a rank: weights and moments, gathered to logical tensors."""
    tensors = {**dict(training.gpt.named_parameters()), **training.optimizer.tensors()}
    assert all(isinstance(tensor, DTensor) for tensor in tensors.values())
    return {name: tensor.detach().full_tensor() for name, tensor in tensors.items()}


def losses(entries: Sequence[dict[str, Any]]) -> list[float]:
    """The training losses, in order."""
    return [entry["lm loss"] for entry in entries if "lm loss" in entry]


def command(*arguments: str, prefix: Sequence[str] = (sys.executable, "-m", "megatsp")) -> subprocess.Popen:
    """`megatsp` with these arguments as a process of its own, in a session of its own."""
    environment = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    return subprocess.Popen(
        [*prefix, *arguments], cwd=ROOT, env=environment, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every path under a folder with its modification time and content; not what is cached beside data."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in sorted(folder.rglob("*"))
        if path != folder and ".sample_index" not in path.relative_to(folder).parts
    }
