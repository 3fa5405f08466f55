"""What opening many files costs: seconds, file handles, memory; and building indices of many documents.

Every case runs in a process of its own.
"""

import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatsp.data.splits import load_splits
from megatsp.data.tokenizer import ByteTokenizer
from pipeline.corpora import configuration, write_described, write_pair
from pipeline.processes import status

SAMPLES = 1000


def opening(folder: Path, files: int, documents: int, few: bool) -> list[dict[str, Any]]:
    """One source, ten folders, as many sources as files; built, then again from the cache.

    few: the ten folders alone, of one kind and packing.
    """
    found = []
    for described in (True,) if few else (True, False):
        kind = "ours" if described else "Megatron's pair"
        here = folder / ("described" if described else "pairs")
        shards = [here / f"source_{i % 10}" / f"shard_{i // 10}" for i in range(files)]
        for i, shard in enumerate(shards):
            if not Path(f"{shard}.idx").exists():
                (write_described if described else write_pair)(shard, documents, i)
        cases = {
            "1 file": [str(shards[0])],
            "10 folders": sorted({str(shard.parent) for shard in shards}),
            f"{files} files": [str(shard) for shard in shards],
        }
        for name, paths in cases.items():
            if few and name != "10 folders":
                continue
            for packing in ("concat",) if few else ("concat", "best_fit"):
                cache = folder / "cache"
                shutil.rmtree(cache, ignore_errors=True)
                for state in ("built", "cached"):
                    result = _alone(_open, paths, packing, str(cache))
                    found.append(dict(files=kind, case=name, packing=packing, state=state, **result))
                    print(found[-1], file=sys.stderr, flush=True)
    return found


def building(folder: Path, million_documents: float, packings: Sequence[str]) -> list[dict[str, Any]]:
    """Documents a second of the first start with each packing."""
    count = int(million_documents * 1e6)
    prefix = folder / f"sparse_{count}"
    if not Path(f"{prefix}.idx").exists():
        write_pair(prefix, count, seed=0, sparse=True)
    found = []
    for packing in packings:
        cache = folder / "index_cache"
        shutil.rmtree(cache, ignore_errors=True)
        result = _alone(_build, str(prefix), packing, str(cache))
        found.append(dict(packing=packing, documents=count, **result))
        print(found[-1], file=sys.stderr, flush=True)
    return found


def _alone(function: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float]:
    with multiprocessing.get_context("fork").Pool(1) as pool:  # what is imported already need not be again
        return pool.apply(function, arguments)


def _open(paths: list[str], packing: str, cache: str) -> dict[str, float]:
    handles, memory = _handles(), status()["VmRSS"]
    started = time.perf_counter()
    config = configuration(paths, 2048, packing=packing, cache=cache)
    data = load_splits(config, ByteTokenizer())
    seconds = time.perf_counter() - started
    opened, opened_memory = _handles(), status()["VmRSS"]
    for draw in data.train.draw(0, SAMPLES):
        data.train.sample(draw)
    return {
        "seconds": seconds,
        "handles_opened": opened - handles,
        "handles_read": _handles() - handles,
        "bytes_opened": opened_memory - memory,
        "bytes_read": status()["VmRSS"] - memory,
    }


def _build(prefix: str, packing: str, cache: str) -> dict[str, float]:
    before = status()
    started = time.perf_counter()
    config = configuration([prefix], 2048, packing=packing, cache=cache)
    load_splits(config, ByteTokenizer())
    built_s = time.perf_counter() - started
    peak = status()["VmHWM"]
    started = time.perf_counter()
    load_splits(config, ByteTokenizer())
    after = status()
    return {
        "seconds": built_s,
        "cached_seconds": time.perf_counter() - started,
        "peak_bytes": peak - before["VmRSS"],  # with the pages of the files
        "private_bytes": after["RssAnon"] - before["RssAnon"],
    }


def _handles() -> int:
    return len(os.listdir("/proc/self/fd"))
