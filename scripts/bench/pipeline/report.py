"""docs/benchmarks/data.md: the tables of what was measured."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from megatsp.bench.table import align
from pipeline.preprocess import OURS, THEIRS, groups

SECTIONS = ("whole", "contest", "loader", "training", "open", "index")  # in the order of the page
INTRODUCTION = """\
# The data pipeline: preprocessing, reading, opening

**Measured** by `python scripts/bench/data.py`, part by part; under each table stands where and when. Cores
were shared with other programs, so compare rows of one table, not tables. [As a picture](data.png).
"""


def page(sections: Mapping[str, Mapping[str, Any]]) -> str:
    """The whole page; sections that were not measured are left out."""
    parts = [INTRODUCTION]
    if any(name in sections for name in ("whole", "contest")):
        parts.append(PREPROCESS)
    for name, table in TABLES.items():
        if name in sections:
            parts.append(f"{table(sections[name]['results'], sections)}\n\n{_machine(sections[name])}\n")
    return "\n".join(parts)


def _machine(section: Mapping[str, Any]) -> str:
    told = ", ".join(f"{name} {value}" for name, value in section["machine"].items())
    return f"Measured: {told}."


PREPROCESS = """\
## Preprocessing

`megatsp preprocess` beside a restatement of Megatron-LM's `tools/preprocess_data.py`
(`scripts/bench/pipeline/megatron_loop.py`: a pool of workers, `imap` of 32 lines, megatron-core's own
`IndexedDatasetBuilder`) around the same tokenizer, as its HuggingFaceTokenizer calls it
(`tokenizer(text).input_ids` of transformers) and, without transformers, by the bare tokenizers library.
Text: JSONL of the standard library's files, again and again. bpe: a byte-level BPE of 32,000 tokens trained
on it. Page cache warm.

MB/s a core: 10^6 bytes of UTF-8 text for a second of processor time of all processes, the parent's
included; MB/s: for a second that passed. Both less what the same command takes for one document (start).
Median [min, max] of interleaved repeats. Peaks: resident MB of the largest worker and of the parent.
"""


def _preprocess(jobs: Sequence[dict[str, Any]], _: Any) -> str:
    titles = ["tokenizer", "workers", "program", "MB of text", "MB/s a core", "to Megatron", "MB/s"]
    titles += ["start s", "worker MB", "parent MB", "same files"]
    lines = []
    for group in groups(jobs):
        base = next((job for job in group if job["system"] == THEIRS), None)
        ours = next(job for job in group if job["system"] == OURS)
        for job in group:
            ratios = [a / b for a, b in zip(job["cpu_rates"], base["cpu_rates"], strict=True)] if base else []
            peaks = (
                max(run[key] for run in job["runs"]) for key in ("worker_peak_bytes", "parent_peak_bytes")
            )
            lines.append(
                [
                    job["tokenizer"],
                    str(job["workers"]),
                    job["system"],
                    f"{job['text_bytes'] / 1e6:,.0f}",
                    _spread(job["cpu_rates"]),
                    f"{median(ratios):.2f}" if ratios else "",
                    _spread(job["wall_rates"]),
                    f"{job['start']['cpu_s']:.1f}",
                    *(f"{peak / 1e6:,.0f}" for peak in peaks),
                    "yes" if job["sha256"] == ours["sha256"] else "no",
                ]
            )
    if len(lines) == 1:
        titles, lines = titles[:-1], [line[:-1] for line in lines]
    return align(titles, lines)


def _whole(jobs: Sequence[dict[str, Any]], sections: Any) -> str:
    took = jobs[0]["runs"][0]
    text = f"All of it once, in {took['wall_s']:,.0f} s, {took['cpu_s']:,.0f} s of processor time:"
    return f"{text}\n\n{_preprocess(jobs, sections)}"


def _contest(jobs: Sequence[dict[str, Any]], sections: Any) -> str:
    times = f"A part of it by every program in turn, {len(jobs[0]['runs'])} times:"
    return f"{times}\n\n{_preprocess(jobs, sections)}"


def _loader(results: Sequence[dict[str, Any]], sections: Mapping[str, Any]) -> str:
    titles = ["packing", "T", "sources", "share", *(f"{n} workers" for n in (0, 1, 2))]
    settings = list(dict.fromkeys(_setting(result) for result in results))
    lines = []
    for setting in settings:
        of_setting = {r["workers"]: r["rates"] for r in results if _setting(r) == setting}
        packing, length, sources, share = setting
        lines.append(
            [packing, f"{length:,}", str(sources), "1/8" if share > 1 else "whole"]
            + [f"{median(of_setting[n]) / 1e6:,.1f}" if n in of_setting else "" for n in (0, 1, 2)]
        )
    slowest = min(median(result["rates"]) for result in results)
    text = f"""\
## Reading

Millions of tokens a second from one rank's `Loader`, the page cache warm, by `data.num_workers`; median of
three windows. Random ids, documents of log-normal length (median 400 tokens); 16,384 tokens a micro-batch,
or one sample. share 1/8: the rank reads its zigzag positions alone, and whole samples are counted: what
eight ranks train on together. Packings other than concat also say where each position's document begins.
A worker hands its batches over to the rank: it reads while the rank computes, which this loop does not.

{align(titles, lines)}
"""
    if "training" in sections:
        fastest = max(median(result["rates"]) for result in sections["training"]["results"])
        text += (
            f"\nThe slowest row is {slowest / fastest:,.0f} times as fast as the fastest training run below."
        )
    return text


def _setting(result: Mapping[str, Any]) -> tuple[str, int, int, int]:
    return result["packing"], result["length"], result["sources"], result["share"]


def _training(results: Sequence[dict[str, Any]], _: Any) -> str:
    titles = ["model", "T", "tokens/s", "step ms", "data/wait-ms", "largest", "steps"]
    lines = [
        [
            result["model"],
            "256",
            f"{median(result['rates']):,.0f}",
            f"{median(result['step_ms']):,.1f}",
            f"{median(result['wait_ms']):.2f}",
            f"{max(result['wait_ms']):.2f}",
            str(len(result["rates"])),
        ]
        for result in results
    ]
    return f"""\
## What training consumes here

Runs of two TSP ranks on this machine's CPU, `data.num_workers=1`: tokens/s of both ranks together; medians
over the steps after the first. data/wait-ms: how long a step waits for its data.

{align(titles, lines)}"""


def _open(results: Sequence[dict[str, Any]], _: Any) -> str:
    titles = ["files of", "source", "packing", "index", "start ms", "handles", "after 1,000 samples"]
    titles += ["MB", "after 1,000 samples"]
    lines = [
        [
            result["files"],
            result["case"],
            result["packing"],
            result["state"],
            f"{1e3 * result['seconds']:,.0f}",
            *(str(result[key]) for key in ("handles_opened", "handles_read")),
            *(f"{result[key] / 1e6:,.1f}" for key in ("bytes_opened", "bytes_read")),
        ]
        for result in results
    ]
    return f"""\
## Opening

`load_splits` at T = 2,048 with 5% held out, in a process of its own, and then 1,000 samples: file handles
and resident memory beyond those before, pages of the files included. 10 folders: a blend of ten folders
with a tenth of the files each. Megatron's pair: without our .json, so the sizes of all documents are read
at every start.

{align(titles, lines)}"""


def _index(results: Sequence[dict[str, Any]], _: Any) -> str:
    titles = ["packing", "documents", "s", "documents/s", "again s", "peak MB", "private MB after"]
    lines = [
        [
            result["packing"],
            f"{result['documents']:,}",
            f"{result['seconds']:,.1f}",
            f"{result['documents'] / result['seconds']:,.0f}",
            f"{result['cached_seconds']:.2f}",
            f"{result['peak_bytes'] / 1e6:,.0f}",
            f"{result['private_bytes'] / 1e6:,.0f}",
        ]
        for result in results
    ]
    return f"""\
## Building an index

The first start with so many documents (a synthetic .idx, a sparse .bin), both splits, T = 2,048; again:
from the cache. Peak: resident, and most of it pages of the .idx; private: what is not.

{align(titles, lines)}"""


def _spread(values: Sequence[float]) -> str:
    middle = f"{median(values):.2f}"
    return middle if len(values) == 1 else f"{middle} [{min(values):.2f}, {max(values):.2f}]"


TABLES = {
    "whole": _whole,
    "contest": _contest,
    "loader": _loader,
    "training": _training,
    "open": _open,
    "index": _index,
}


def plot(sections: Mapping[str, Mapping[str, Any]], file: Path) -> None:
    """MB/s a core by program, and tokens/s of loaders beside training's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    if "contest" in sections:
        bars = {
            f"{job['system']}\n{job['tokenizer']}, {job['workers']}": job
            for job in sections["contest"]["results"]
        }
        for i, job in enumerate(bars.values()):
            left.barh(i, median(job["cpu_rates"]), color="C0" if job["system"] == OURS else "C7")
        left.set_yticks(range(len(bars)), [*bars], fontsize=7)
        left.invert_yaxis()
        left.set(xscale="log", xlabel="MB/s a core", title="preprocessing, by tokenizer and workers")
        left.set_xlim(left=0.5)
    if "loader" in sections:
        results = [r for r in sections["loader"]["results"] if r["workers"] == 1]
        names = [f"{r['packing']}, T {r['length']:,}, {r['sources']} src, 1/{r['share']}" for r in results]
        for i, result in enumerate(results):
            right.barh(i, median(result["rates"]), color="C0")
        trained = sections.get("training", {}).get("results", [])
        for i, result in enumerate(trained, len(results)):
            right.barh(i, median(result["rates"]), color="C3")
            names.append(f"training {result['model']}, 2 ranks")
        right.set_yticks(range(len(names)), names, fontsize=7)
        right.invert_yaxis()
        right.set(xscale="log", xlabel="tokens/s", title="one rank's loader (blue), training (red)")
    for axes in (left, right):
        axes.grid(alpha=0.3, axis="x", which="both")
    figure.savefig(file, dpi=120)
