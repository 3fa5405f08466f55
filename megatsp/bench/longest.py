"""The longest sequence that fits a rank's memory, by simulation."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from megatsp.bench.memory import StepMemory
from megatsp.bench.schemes import Case
from megatsp.bench.table import align
from megatsp.schema import Config
from megatsp.validate import validate

BISECTIONS = 3  # the answer is known to an eighth of a doubling
MOST = 2**31  # tokens
GB = 10**9


@dataclass(frozen=True)
class Longest:
    """seq_length: the longest that fits, 0 if not even the first; memory: of a rank at it."""

    seq_length: int
    memory: StepMemory | None


def find_longest(
    peak: Callable[[int], StepMemory | None], first: int, step: int, limit_bytes: int
) -> Longest:
    """Doubles the length from `first` while its peak fits, then halves what is left of the doubling.

    peak: of a length; None, if it could not be found, counts as too much. step: the lengths between are
    multiples of it.
    """
    low, memory, high = 0, None, first
    while high <= MOST and (found := _if_fits(peak(high), limit_bytes)):
        low, memory, high = high, found, 2 * high
    for _ in range(BISECTIONS if low else 0):
        middle = (low + high) // 2 // step * step
        if middle <= low:
            break
        if found := _if_fits(peak(middle), limit_bytes):
            low, memory = middle, found
        else:
            high = middle
    return Longest(low, memory)


def _if_fits(memory: StepMemory | None, limit_bytes: int) -> StepMemory | None:
    return memory if memory is not None and memory.peak <= limit_bytes else None


def with_length(case: Case, seq_length: int) -> Config:
    """The case's configuration at another sequence length.

    Raises:
        ValueError: it does not split into that length.
    """
    trainer = replace(case.composed.trainer, seq_length=seq_length)
    return validate(replace(case.composed, trainer=trainer), case.world_size)


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
