"""Results as they might have been measured."""

from dataclasses import asdict

from megatsp.bench.measure import Speed
from megatsp.bench.memory import StepMemory
from megatsp.bench.results import Failure, Report, Row
from megatsp.schema import Config, TrainerConfig

MB = 10**6


def make_row(
    scheme: str, rates: list[float], seq_length: int = 64, loss: float = 5.0, world_size: int = 2, **more
) -> Row:
    """A row whose repeats ran at these tokens/s; a rate of 0 failed."""
    config = asdict(Config(trainer=TrainerConfig(seq_length=seq_length)))
    speeds = {n: Speed(512 / rate, rate, 10.0, loss) for n, rate in enumerate(rates) if rate}
    failures = [Failure(f"repeat {n + 1}", "it broke", "a trace") for n, rate in enumerate(rates) if not rate]
    point = {"trainer.seq_length": str(seq_length)}
    return Row(point, world_size, scheme, config, 2e9, speeds=speeds, failures=failures, **more)


def make_memory(peak_mb: int, **moved: int) -> StepMemory:
    part = peak_mb * MB // 5
    return StepMemory(
        part, part, part, part, part, peak=peak_mb * MB, allocated=2 * peak_mb * MB, moved=moved
    )


def make_report(rows: list[Row]) -> Report:
    return Report(["megatsp", "bench"], {"cpu": "abacus", "torch": "2"}, "tsp", rows)
