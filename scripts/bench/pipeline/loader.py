"""Tokens a second of one rank's Loader, and what a training run here consumes."""

import sys
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from pipeline.corpora import configuration, write_pair
from pipeline.processes import python, watch

from megatsp.data.blend import Blend
from megatsp.data.loader import Loader, Share
from megatsp.data.splits import load_splits
from megatsp.data.tokenizer import ByteTokenizer
from megatsp.schema import DataConfig
from megatsp.training.logs import read_metrics

RANKS = 8  # of the sequence, for a share
WINDOWS = 3


def loaders(
    folder: Path, million_tokens: float, lengths: Sequence[int], seconds: float
) -> list[dict[str, Any]]:
    """Every setting's rate: the median of WINDOWS windows of so many seconds, after as long a warm-up."""
    documents = int(million_tokens * 1e6 / 820 / 10)
    names = [folder / f"source_{i}" for i in range(10)]
    for i, name in enumerate(names):
        if not Path(f"{name}.idx").exists():
            write_pair(name, documents, seed=i)
    found = []
    for packing, length, sources in product(("concat", "best_fit"), lengths, (1, 10)):
        paths = [str(name) for name in names[:sources]]
        blend = load_splits(configuration(paths, length, packing=packing), ByteTokenizer()).train
        for share, workers in product((1, RANKS), (0, 1, 2)):
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
    loader = Loader(blend, 0, Share(8 * micro, micro, 0, 1, spans), DataConfig(num_workers=workers), pin=False)
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
    source = folder / "source_0"
    found = []
    for model in models:
        name = f"train_{model}"
        command = ["-m", "megatsp", "train", "experiment=quickstart", f"name={name}", f"model={model}"]
        command += [f"data.path=[{source}]", "model.vocab_size=50304", f"output_dir={folder}", "trainer.wandb=off"]
        command += [f"trainer.train_iters={steps}", "trainer.log_interval=1", "trainer.eval_interval=1000000"]
        if model != "gpt_tiny":
            command += ["trainer.micro_batch_size=2", "trainer.global_batch_size=2"]
        watch(python(*command))
        # The first step compiles and fills buffers.
        lines = [line for line in read_metrics(folder / name / "metrics.jsonl") if "tokens/s/gpu" in line][1:]
        rates = [2 * line["tokens/s/gpu"] for line in lines]
        found.append(
            {
                "model": model,
                "rates": rates,
                "wait_ms": [line["data/wait-ms"] for line in lines],
                "step_ms": [line["iteration-time-ms"] for line in lines],
            }
        )
        print(f"{name}: {median(rates):.0f} tokens/s", file=sys.stderr, flush=True)
    return found
