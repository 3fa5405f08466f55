"""The data pipeline: preprocessing beside Megatron's loop, reading beside what training consumes, opening.

    python scripts/bench/data.py all --output docs/benchmarks/data.md   # an hour on two cores
    python scripts/bench/data.py loader                                 # minutes; tables on the terminal
    python scripts/bench/data.py all --smoke                            # seconds: tries the program

What was measured is kept in OUTPUT's results/data.json, so that parts can be measured one by one.
"""

import json
import platform
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pipeline import loader, opening, preprocess, report

from megatsp.bench.machine import describe_machine
from megatsp.parser import Parser

FORMAT = "megatsp-data-1"
PARTS = {
    "preprocess": ("whole", "contest"),
    "loader": ("training", "loader"),
    "open": ("open", "index"),
}
LOADERS: tuple[Any, ...] = ((1, 10), (0, 1, 2), 0.5)  # numbers of sources, of workers, seconds
SMOKE_LOADERS: tuple[Any, ...] = ((1,), (0, 1), 0.02)
PACKAGES = ("megatron-core", "transformers", "tokenizers", "numpy")


def main(arguments: list[str]) -> int:
    """Returns 2 if the arguments make no sense."""
    try:
        given = _parse(arguments)
    except ValueError as error:
        print(f"data: {error}", file=sys.stderr)
        return 2
    stored = given.output.parent / "results" / f"{given.output.stem}.json" if given.output else None
    sections = _read(stored) if stored else {}
    machine = {**describe_machine(), **_versions()}
    with tempfile.TemporaryDirectory(prefix="megatsp-bench-", dir=given.folder) as temporary:
        for name in given.sections:
            results = _measure(name, given, Path(temporary))
            if not results:
                continue
            sections[name] = {"machine": machine, "results": results}
            if stored:
                stored.parent.mkdir(parents=True, exist_ok=True)
                stored.write_text(json.dumps({"format": FORMAT, "sections": sections}, indent=1) + "\n")
                given.output.write_text(report.page(sections))
    print(report.page({name: section for name, section in sections.items() if name in given.sections}))
    if given.plot:
        report.plot(sections, given.plot)
    return 0


def _measure(name: str, given: Any, folder: Path) -> list[dict[str, Any]]:
    """One section's results; none where its size is 0."""
    smoke = given.smoke
    measures: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "whole": lambda: (
            preprocess.whole(folder / "text", given.size_mb, given.vocab_size) if given.size_mb else []
        ),
        "contest": lambda: (
            preprocess.contest(
                folder / "text",
                given.part_mb,
                given.workers,
                given.repeats,
                given.vocab_size,
                given.tokenizers,
                less_start=not smoke,
            )
            if given.part_mb
            else []
        ),
        "training": lambda: loader.training(folder / "tokens", 3 if smoke else 20, given.models),
        "loader": lambda: loader.loaders(
            folder / "tokens", given.million_tokens, given.seq_length, *SMOKE_LOADERS if smoke else LOADERS
        ),
        "open": lambda: opening.opening(folder / "open", given.files, 400 if smoke else 1000, few=smoke),
        "index": lambda: opening.building(
            folder / "index",
            given.million_documents,
            ("greedy",) if smoke else ("concat", "greedy", "best_fit"),
        ),
    }
    return measures[name]()


def _parse(arguments: list[str]) -> Any:
    parser = Parser("data.py", "Measures the data pipeline.")
    add = parser.add_argument
    add("part", choices=(*PARTS, "all"), help="what to measure")
    add("--output", type=Path, metavar="PAGE.md", help="write a page, and results/PAGE.json beside it")
    add("--plot", type=Path, metavar="FILE.png", help="draw it")
    add("--folder", type=Path, metavar="FOLDER", help="for temporary files: 3 GB (default: the system's)")
    add(
        "--only",
        nargs="+",
        choices=report.SECTIONS,
        metavar="SECTION",
        help="of " + ", ".join(report.SECTIONS),
    )
    add("--smoke", action="store_true", help="tiny sizes, few cases: tries the program")
    add("--size-mb", type=float, metavar="MB", help="whole: text (default: 1000; 0: not measured)")
    add("--part-mb", type=float, metavar="MB", help="contest: text (default: 100; 0: not measured)")
    add("--repeats", type=int, default=0, metavar="N", help="contest: times (default: 3)")
    add("--workers", type=int, nargs="+", metavar="N", help="contest: numbers of workers (default: 1 2)")
    add("--tokenizers", nargs="+", choices=("bpe", "byte"), help="contest: (default: both)")
    add("--vocab-size", type=int, metavar="N", help="tokens of the BPE (default: 32000)")
    add("--models", nargs="+", metavar="MODEL", help="training: configs (default: gpt_tiny gpt_125m)")
    add("--seq-length", type=int, nargs="+", metavar="T", help="loader: (default: 2048 131072)")
    add("--million-tokens", type=float, metavar="N", help="loader: of ten sources (default: 50)")
    add("--files", type=int, metavar="N", help="open: (default: 100)")
    add("--million-documents", type=float, metavar="N", help="index: (default: 10)")
    given = parser.parse_args(arguments)
    defaults: dict[str, tuple[Any, Any]] = {  # and what they are with --smoke
        "size_mb": (1000.0, 0.2), "part_mb": (100.0, 0.1), "repeats": (3, 1), "workers": ([1, 2], [1]),
        "tokenizers": (["bpe", "byte"], ["byte"]), "vocab_size": (32000, 300),
        "models": (["gpt_tiny", "gpt_125m"], []),
        "seq_length": ([2048, 131072], [128]), "million_tokens": (50.0, 0.2), "files": (100, 10),
        "million_documents": (10.0, 0.001),
    }  # fmt: skip
    for name, choices in defaults.items():
        if getattr(given, name) in (None, 0) and not (name.endswith("_mb") and getattr(given, name) == 0):
            setattr(given, name, choices[given.smoke])
    if given.repeats < 1 or min(given.workers) < 1:
        raise ValueError("--repeats and --workers: at least 1")
    if given.files < 10 or given.files % 10:
        raise ValueError(f"--files {given.files}: a multiple of 10")
    parts = PARTS if given.part == "all" else (given.part,)
    given.sections = [name for part in parts for name in PARTS[part] if name in (given.only or PARTS[part])]
    if not given.sections:
        raise ValueError(f"--only {' '.join(given.only)} is no section of {given.part}: {PARTS[given.part]}")
    return given


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    content = json.loads(path.read_text())
    assert content["format"] == FORMAT
    sections: dict[str, Any] = content["sections"]
    return sections


def _versions() -> dict[str, str]:
    found = {"kernel": platform.release()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
