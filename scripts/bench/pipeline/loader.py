"""Tokens a second of one rank's Loader, and what a training run here consumes."""

import sys
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from megatsp.data.blend import Blend
from megatsp.data.loader import Loader, Share
from megatsp.data.splits import load_splits
from megatsp.data.tokenizer import ByteTokenizer
from megatsp.schema import DataConfig
from megatsp.training.logs import read_metrics
from pipeline.corpora import configuration, write_described, write_pair
from pipeline.processes import python, watch

RANKS = 8  # of the sequence, for a share
WINDOWS = 3


def loaders(
    folder: Path,
    million_tokens: float,
    lengths: Sequence[int],
    sources_of: Sequence[int],
    workers_of: Sequence[int],
    seconds: float,
) -> list[dict[str, Any]]:
    """Every setting's rate: the median of WINDOWS windows of so many seconds, after as long a warm-up."""
    documents = int(million_tokens * 1e6 / 820 / 10)
    names = [folder / f"source_{i}" for i in range(10)]
    for i, name in enumerate(names):
        if not Path(f"{name}.idx").exists():
            write_pair(name, documents, seed=i)
    found = []
    for packing, length, sources in product(("concat", "best_fit"), lengths, sources_of):
        paths = [str(name) for name in names[:sources]]
        blend = load_splits(
            configuration(paths, length, packing=packing, valid_fraction=0.0), ByteTokenizer()
        ).train
        for share, workers in product((1, RANKS), workers_of):
            rates = _rates(blend, length, share, workers, seconds)
            setting = dict(packing=packing, length=length, sources=sources, share=share, workers=workers)
            found.append({**setting, "rates": rates})
            print(f"{setting}: {median(rates) / 1e6:.1f} M tokens/s", file=sys.stderr, flush=True)
    return found


def _rates(blend: Blend, length: int, share: int, workers: int, seconds: float) -> list[float]:
    """Tokens a second of whole samples, of which a share is read: what `share` ranks train on together."""
    micro = max(1, 16384 // length)
    half = length // (2 * share)  # the first rank's zigzag share
    spans = ((0, half), (length - half, length)) if share > 1 else ((0, length),)
    loader = Loader(
        blend, 0, Share(8 * micro, micro, 0, 1, spans), DataConfig(num_workers=workers), pin=False
    )
    try:
        rates = []
        for window in range(1 + WINDOWS):
            started, samples = time.perf_counter(), 0
            while (passed := time.perf_counter() - started) < seconds or not samples:
                batch = next(loader)
                assert batch[0].shape == (micro, length // share)
                samples += micro
            if window:  # the first fills what is read ahead
                rates.append(samples * length / passed)
        return rates
    finally:
        loader.close()


def training(folder: Path, steps: int, models: Sequence[str]) -> list[dict[str, Any]]:
    """Short runs of two ranks: tokens a second of both, and how long a step waits for data."""
    source = folder / "bytes"
    write_described(source, 2000, seed=0)
    found = []
    for model in models:
        name = f"train_{model}"
        words = ["-m", "megatsp", "train", "experiment=quickstart", f"name={name}", f"model={model}"]
        words += [
            f"data.path=[{source}]",
            f"output_dir={folder}",
            "logging.wandb=disabled",
            "scheduler.lr_warmup_iters=1",
        ]
        words += [f"trainer.train_iters={steps}", "logging.log_interval=1", "trainer.eval_interval=1000000"]
        if model != "gpt_tiny":
            words += ["trainer.micro_batch_size=2", "trainer.global_batch_size=2"]
        watch(python(*words))
        entries = read_metrics(folder / name / "metrics.jsonl")
        lines = [entry for entry in entries if "tokens/s/gpu" in entry][1:]  # the first step fills buffers
        results = {
            "rates": [2 * line["tokens/s/gpu"] for line in lines],
            "wait_ms": [line["data/wait-ms"] for line in lines],
            "step_ms": [line["iteration-time-ms"] for line in lines],
        }
        found.append({"model": model, **results})
        print(f"{name}: {median(results['rates']):.0f} tokens/s", file=sys.stderr, flush=True)
    return found
