"""The longest sequence that fits a rank's memory, by simulation."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from megatsp.bench.memory import StepMemory
from megatsp.bench.schemes import Case
from megatsp.bench.table import align
from megatsp.schema import Config
from megatsp.validate import validate

BISECTIONS = 3  # the answer is known to an eighth of itself
GB = 10**9


@dataclass(frozen=True)
class Longest:
    """seq_length: the longest that fits, 0 if not even the first; memory: of a rank at it."""

    seq_length: int
    memory: StepMemory | None


def find_longest(peak: Callable[[int], StepMemory], first: int, limit_bytes: int) -> Longest:
    """Doubles the length from `first` while its peak fits, then halves what is left of the doubling.

    Every length tried is a multiple of `first` over 8, if that is whole; memory grows with length.
    """
    fits, memory = 0, None
    length = first
    while (found := peak(length)).peak <= limit_bytes:
        fits, memory, length = length, found, 2 * length
    low, high = fits, length
    step = max(1, first // 2**BISECTIONS)
    for _ in range(BISECTIONS if fits else 0):
        middle = (low + high) // 2 // step * step
        found = peak(middle)
        if found.peak <= limit_bytes:
            low, memory = middle, found
        else:
            high = middle
    return Longest(low, memory)


def with_length(case: Case, seq_length: int) -> Config:
    """The case's configuration at another sequence length.

    Raises:
        ValueError: it does not split into that length.
    """
    trainer = replace(case.config.trainer, seq_length=seq_length)
    return validate(replace(case.config, trainer=trainer), case.world_size)


def render(found: list[tuple[Case, Longest, str]], limit_bytes: int) -> str:
    """A table of what fits; the third is why a case could not be tried, or ""."""
    parts = ("peak", "weights", "gradients", "optimizer", "activations", "communication")
    titles = ["scheme", "ranks", "longest T", *(f"{part} GB" for part in parts), "note"]
    titles[1:1] = [key.rpartition(".")[2] for key in found[0][0].point]
    lines = []
    for case, longest, note in found:
        cells = [f"{getattr(longest.memory, part) / GB:.1f}" if longest.memory else "" for part in parts]
        length = f"{longest.seq_length:,}" if longest.memory else ""
        too_long = (
            "" if longest.memory or note else f"T = {case.config.trainer.seq_length:,} is too long already"
        )
        lines.append(
            [case.scheme.label, *case.point.values(), str(case.world_size), length, *cells, note or too_long]
        )
    limit = f"{limit_bytes / GB:g} GB (10^9 bytes) a rank"
    return f"longest trainer.seq_length within {limit}, simulated, to an eighth:\n\n{align(titles, lines)}"
