"""Compiles every kernel with every config for every chip, and says what the machine code takes.

    python scripts/aot_report.py              # a table, and docs/benchmarks/aot.md
    python scripts/aot_report.py --check      # the gate alone: exit 1 if a kernel spills, say
    python scripts/aot_report.py --check --known    # a sample, if the page is of these very kernels
    python scripts/aot_report.py --op swiglu --target gfx942

No GPU is needed. TRITON_INTERPRET must not be set.
"""

import hashlib
import json
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

from megatsp_kernels import registry
from megatsp_kernels.aot import TARGETS, Compiled, CompileError, Variant, compile_variant, problems
from megatsp_kernels.tune import describe

from megatsp.bench.machine import describe_machine
from megatsp.bench.table import align
from megatsp.parser import Parser

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "benchmarks" / "aot.md"
SAMPLE = 16  # one of so many compilations is made again where the page is known to hold
WORKERS = 2  # a compiler takes a core and up to a gigabyte
LEGEND = """\
regs: registers a lane (AMD: vector and accumulator registers together; agpr: the latter alone), and those of
the code for tensors of 2 GiB and more, which AMD's compiler addresses otherwise. spills: vector + scalar
registers. scratch: bytes a lane. shared: KiB of LDS or shared memory a workgroup. occupancy: workgroups at
once on a compute unit or multiprocessor, their warps of all that it can hold, and what limits them; an
estimate. matrix: matrix instructions in the text. wide: loads + stores of 16 bytes a lane, of all. sync:
acquires + releases at system scope. FLOP/byte: of the innermost loop, products over bytes loaded. code: KiB.
"""


@dataclass(frozen=True)
class Job:
    """One compilation: which of the variants that an operation lists for a chip. large: 2 GiB and more."""

    op: str
    target: str
    index: int
    large: bool


@dataclass(frozen=True)
class Row:
    """A compiled variant. compiled: None where it does not compile."""

    job: Job
    label: str
    config: str
    compiled: Compiled | None
    problems: list[str]

    @property
    def name(self) -> str:
        size = ", 2 GiB and more" if self.job.large else ""
        return f"{self.label}, {self.job.target}{size} [{self.config}]"


def main(arguments: list[str]) -> int:
    parser = Parser("aot_report.py", "Compiles every kernel for every chip and checks the machine code.")
    parser.add_argument("--op", nargs="+", default=[], metavar="NAME", help=f"of {', '.join(registry.OPS)}")
    parser.add_argument("--target", nargs="+", default=TARGETS, choices=TARGETS, help="chips (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything")
    parser.add_argument("--check", action="store_true", help="the gate alone: print problems, write no page")
    parser.add_argument(
        "--known",
        action="store_true",
        help=f"compile a sample if {DOCUMENT.name} was made from these very sources by this Triton, else all",
    )
    try:
        given = parser.parse_args(arguments)
        if "TRITON_INTERPRET" in os.environ:
            raise ValueError("TRITON_INTERPRET is set, so nothing would be compiled: unset it")
        jobs = list(list_jobs(given.op, given.target))
    except ValueError as error:
        print(f"aot_report: {error}", file=sys.stderr)
        return 2
    if given.known and is_known(DOCUMENT.read_text()):
        every = len(jobs)
        jobs = sample(jobs)
        print(f"{DOCUMENT.name} is of these kernels: {len(jobs)} of {every} are compiled", file=sys.stderr)
    began = time.monotonic()
    rows = compile_all(jobs)
    print(f"{len(rows)} compilations in {time.monotonic() - began:.0f} s", file=sys.stderr)
    if given.json:
        given.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    if not given.check:
        text = render(rows)
        print(text)
        if given.op or tuple(given.target) != TARGETS:
            print(f"not everything was compiled: {DOCUMENT.name} is left as it is", file=sys.stderr)
        else:
            sound = not any(row.problems for row in rows)
            DOCUMENT.write_text(document(text, sources() if sound else "with problems"))
            print(f"wrote {DOCUMENT}", file=sys.stderr)
    failed = [f"{row.name}: {problem}" for row in rows for problem in row.problems]
    print("\n".join(failed) or f"{len(rows)} compilations, no problems")
    return 1 if failed else 0


def list_jobs(ops: Sequence[str], targets: Iterable[str]) -> Iterator[Job]:
    """Every variant of the operations; on gfx942 those of the config in use for large tensors, too."""
    for target in targets:
        for op in ops or registry.OPS:
            seen = set()
            for index, variant in enumerate(_variants(op, target)):
                yield Job(op, target, index, large=False)
                name = (variant.label, str(variant.constants))
                if target == "gfx942" and name not in seen:  # a kernel's first config
                    yield Job(op, target, index, large=True)
                seen.add(name)


def sources() -> str:
    """What the machine code is made from: a digest of the kernels, of the gate and of Triton's version."""
    import triton

    digest = hashlib.sha256(triton.__version__.encode())
    for path in sorted([*(ROOT / "kernels" / "megatsp_kernels").rglob("*.py"), Path(__file__).resolve()]):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def is_known(page: str) -> bool:
    """Whether a page was made from these sources, and had no problems to show."""
    return f"sources {sources()}" in page


def sample(jobs: Sequence[Job]) -> list[Job]:
    """Some of the jobs: the first of every operation for every chip, and one of so many of all."""
    first = {(job.op, job.target, job.large): job for job in reversed(jobs)}
    chosen = {*first.values(), *jobs[::SAMPLE]}
    return [job for job in jobs if job in chosen]


@lru_cache
def _variants(op: str, target: str) -> list[Variant]:
    return [variant for _, variant in registry.variants(target, [op])]


def compile_all(jobs: Sequence[Job]) -> list[Row]:
    """In the jobs' order, by processes of their own; a compiler that dies costs its job alone."""
    found: dict[Job, Row] = {}
    context = multiprocessing.get_context("spawn")

    def run(some: Sequence[Job], workers: int) -> list[Job]:
        """Those whose process died, and whoever was in the pool with them."""
        lost = []
        with ProcessPoolExecutor(workers, context) as pool:
            futures: dict[Future[Row], Job] = {pool.submit(compile_job, job): job for job in some}
            for future in as_completed(futures):
                job = futures[future]
                try:
                    found[job] = future.result()
                except BrokenProcessPool:
                    lost.append(job)
                    continue
                print(f"[{len(found)}/{len(jobs)}] {found[job].name}", file=sys.stderr, flush=True)
        return lost

    for job in run(jobs, WORKERS):
        if run([job], 1):
            found[job] = _row(job, CompileError("the compiler died"))
    return [found[job] for job in jobs]


def compile_job(job: Job) -> Row:
    variant = _variants(job.op, job.target)[job.index]
    try:
        return _row(job, compile_variant(variant, job.target, job.large))
    except CompileError as error:
        return _row(job, error)


def _row(job: Job, compiled: Compiled | CompileError) -> Row:
    variant = _variants(job.op, job.target)[job.index]
    wrong = problems(compiled, variant)
    namesakes = [v for v in _variants(job.op, job.target) if v.label == variant.label]
    constants = ", ".join(
        f"{name}={value}"
        for name, value in variant.constants.items()
        if any(other.constants.get(name) != value for other in namesakes)
    )
    label = f"{variant.label} ({constants})" if constants else variant.label
    return Row(
        job, label, describe(variant.config), compiled if isinstance(compiled, Compiled) else None, wrong
    )


def render(rows: Sequence[Row]) -> str:
    """A table a chip."""
    large = {(row.job.op, row.job.target, row.job.index): row.compiled for row in rows if row.job.large}
    titles = ["kernel", "config", "regs", "2 GiB+", "agpr", "spills", "scratch", "shared", "occupancy"]
    titles += ["matrix", "wide", "atomics", "sync", "FLOP/byte", "code"]
    parts = []
    for target in dict.fromkeys(row.job.target for row in rows):
        lines = []
        for row in rows:
            if row.job.target == target and not row.job.large:
                same = large.get((row.job.op, target, row.job.index))
                lines.append([row.label, row.config, *_cells(row, same)])
        parts.append(f"## {target}\n\n{align(titles, lines)}\n")
    return "\n".join(parts)


def _cells(row: Row, large: Compiled | None) -> list[str]:
    found = row.compiled
    if found is None:
        return ["does not compile", *[""] * 12]
    seen, fit = found.instructions, found.occupancy
    names = ", ".join(f"{times} {name.replace('.sync.aligned', '')}" for name, times in seen.matrix.items())
    return [
        str(found.registers),
        str(large.registers) if large else "",
        str(found.agpr or ""),
        f"{found.vgpr_spills}+{found.sgpr_spills}",
        str(found.scratch_bytes),
        f"{found.shared_bytes / 1024:.3g}",
        f"{fit.groups} ({fit.warps} of {fit.warps_limit} warps; {fit.limited_by})",
        names,
        f"{seen.wide_loads + seen.wide_stores} of {seen.loads + seen.stores}",
        str(seen.atomics or ""),
        f"{seen.system_acquires}+{seen.system_releases}"
        if seen.system_acquires + seen.system_releases
        else "",
        f"{seen.intensity:.0f}" if seen.intensity else "",
        f"{found.code_bytes / 1024:.1f}",
    ]


def document(tables: str, made_from: str) -> str:
    """The tables as a page of their own."""
    import triton

    machine = describe_machine()
    versions = f"triton {triton.__version__}, torch {machine['torch']}"
    made = f"{versions}, commit {machine['commit']}, {machine['date'][:10]}"
    return f"""# Kernels compiled ahead of time

Made by `python scripts/aot_report.py` ({made}); nothing here was
run on a GPU. bf16 operands, unless a name says fp32. The first config of a kernel is the one used. The same
program is the gate: no spills, no scratch, matrix instructions where there are products, system scope where
other GPUs are waited for, shared memory within the chip's limit, no atomic sums of floating-point numbers.
Kernels, gate and Triton as they were then: sources {made_from}.

{LEGEND}
{re.sub(" {2,}|-{4,}", lambda run: run[0][:3].replace("   ", " "), tables)}"""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
