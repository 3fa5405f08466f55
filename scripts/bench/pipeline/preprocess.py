"""MB/s of text per core: megatsp preprocess beside Megatron-LM's loop around the same tokenizers."""

import hashlib
import importlib.util
import json
import shutil
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from pipeline.processes import ROOT, Used, python, watch

OURS, THEIRS, BARE = "megatsp", "Megatron", "Megatron, bare tokenizers"
QUIET = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


@dataclass
class Job:
    """One system at one setting, and what each of its runs used."""

    system: str
    tokenizer: str  # bpe or byte
    workers: int
    text_bytes: int
    runs: list[Used]
    start: Used  # the same command for one document
    sha256: str = ""  # of the .bin and .idx

    @property
    def cpu_rates(self) -> list[float]:
        """MB of text a second of processor time, less the start."""
        return [self.text_bytes / 1e6 / max(run.cpu_s - self.start.cpu_s, 1e-3) for run in self.runs]

    @property
    def wall_rates(self) -> list[float]:
        """MB of text a second, less the start."""
        return [self.text_bytes / 1e6 / max(run.wall_s - self.start.wall_s, 1e-3) for run in self.runs]


def standard_library() -> list[str]:
    """The documents of data/python_stdlib."""
    spec = importlib.util.spec_from_file_location("prepare", ROOT / "data" / "python_stdlib" / "prepare.py")
    assert spec is not None and spec.loader is not None
    prepare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(prepare)
    return [text for _, text in prepare.collect(Path(sysconfig.get_path("stdlib")))[0]]


def write_jsonl(path: Path, texts: Sequence[str], wanted_bytes: int) -> int:
    """Repeats the texts to about so many bytes of text, whole documents; returns how many bytes."""
    written = 0
    records = [(json.dumps({"text": text}) + "\n", len(text.encode())) for text in texts]
    with path.open("w", encoding="utf-8") as file:
        for line, size in cycle(records):
            file.write(line)
            written += size
            if written >= wanted_bytes:
                return written
    raise AssertionError("no texts")


def train_tokenizer(folder: Path, source: Path, vocab_size: int) -> Path:
    """A byte-level BPE."""
    path = folder / f"bpe_{vocab_size}"
    if not path.exists():
        command = ["-m", "megatsp", "preprocess", "train-tokenizer", "--input", str(source)]
        watch(python(*command, "--vocab-size", str(vocab_size), "--output", str(path)))
    return path


def contest(
    folder: Path,
    part_mb: float,
    workers: Sequence[int],
    repeats: int,
    vocab_size: int,
    tokenizers: Sequence[str],
    less_start: bool,
) -> list[dict[str, Any]]:
    """All systems on the same text, one after the other, again and again."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = standard_library()
    one, part = folder / "one.jsonl", folder / "part.jsonl"
    write_jsonl(one, texts, 1)
    sample = folder / "sample.jsonl"
    write_jsonl(sample, texts, int(min(part_mb, 12) * 1e6))
    tokenizer = train_tokenizer(folder, sample, vocab_size)
    text_bytes = write_jsonl(part, texts, int(part_mb * 1e6))

    def start(system: str, kind: str, count: int) -> Used:
        if not less_start:
            return Used(0, 0, 0, 0, "")
        return _run(folder, one, system, kind, tokenizer, count)[0]

    jobs = []
    for kind in tokenizers:
        for count in workers:
            systems = (OURS, THEIRS, BARE) if kind == "bpe" else (OURS, THEIRS)
            jobs += [Job(name, kind, count, text_bytes, [], start(name, kind, count)) for name in systems]
    for repeat in range(repeats):
        for job in jobs:
            used, job.sha256 = _run(folder, part, job.system, job.tokenizer, tokenizer, job.workers)
            job.runs.append(used)
            _say(f"repeat {repeat + 1} of {repeats}", job)
    part.unlink()
    return [_described(job) for job in jobs]


def whole(folder: Path, size_mb: float, vocab_size: int) -> list[dict[str, Any]]:
    """megatsp preprocess alone on the whole text, one worker."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = standard_library()
    one, source, sample = folder / "one.jsonl", folder / "whole.jsonl", folder / "sample.jsonl"
    write_jsonl(one, texts, 1)
    write_jsonl(sample, texts, int(min(size_mb, 12) * 1e6))
    tokenizer = train_tokenizer(folder, sample, vocab_size)
    text_bytes = write_jsonl(source, texts, int(size_mb * 1e6))
    start = _run(folder, one, OURS, "bpe", tokenizer, 1)[0]
    used, digest = _run(folder, source, OURS, "bpe", tokenizer, 1)
    job = Job(OURS, "bpe", 1, text_bytes, [used], start, digest)
    _say("whole", job)
    source.unlink()
    return [_described(job)]


def _run(
    folder: Path, source: Path, system: str, kind: str, tokenizer: Path, workers: int
) -> tuple[Used, str]:
    output = folder / "output"
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    if system == OURS:
        spec = str(tokenizer) if kind == "bpe" else "byte"
        words = ["-m", "megatsp", "preprocess", "--input", str(source), "--append-eod", "--tokenizer", spec]
        command = python(*words, "--output-prefix", str(output / "x"), "--workers", str(workers))
    else:
        spec = {THEIRS: f"transformers:{tokenizer}", BARE: f"tokenizers:{tokenizer}"}[system]
        loop = Path(__file__).with_name("megatron_loop.py")
        command = python(
            str(loop), str(source), str(output / "x"), spec if kind == "bpe" else "byte", str(workers)
        )
    used = watch(command, QUIET)
    digest = hashlib.sha256()
    for suffix in (".bin", ".idx"):
        with (output / f"x_text_document{suffix}").open("rb") as file:
            for block in iter(lambda: file.read(1 << 22), b""):
                digest.update(block)
    shutil.rmtree(output)
    return used, digest.hexdigest()


def _described(job: Job) -> dict[str, Any]:
    for run in (*job.runs, job.start):
        run.output = ""
    return {**asdict(job), "cpu_rates": job.cpu_rates, "wall_rates": job.wall_rates}


def _say(where: str, job: Job) -> None:
    rates = f"{job.cpu_rates[-1]:.2f} MB/s a core, {job.wall_rates[-1]:.2f} MB/s"
    print(
        f"{where}: {job.system} {job.tokenizer}, {job.workers} workers: {rates}", file=sys.stderr, flush=True
    )


def groups(jobs: Sequence[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Jobs that differ in the system alone."""
    settings = dict.fromkeys((job["tokenizer"], job["workers"]) for job in jobs)
    for setting in settings:
        yield [job for job in jobs if (job["tokenizer"], job["workers"]) == setting]
