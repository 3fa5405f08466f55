"""The result of a benchmark: one row a scheme, sweep point and world; as JSON and back."""

import json
import math
from dataclasses import asdict, dataclass, field
from statistics import linear_regression, median
from typing import Any

from megatsp.bench.measure import Speed
from megatsp.bench.memory import StepMemory

FORMAT = "megatsp-bench-1"
LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}  # relative, between schemes that do the same work


@dataclass(frozen=True)
class Failure:
    """A measurement that gave nothing. during: which one; reason: in a line; detail: tracebacks."""

    during: str
    reason: str
    detail: str


@dataclass
class Row:
    """All that was measured of one scheme at one point of the sweep on one number of ranks.

    point: the swept keys' values; config: the resolved configuration; refused: why it cannot run
    at these sizes ("" where it can). speeds: by repeat; a repeat that failed has none.
    """

    point: dict[str, str]
    world_size: int
    scheme: str
    config: dict[str, Any]
    flops_per_token: float
    refused: str = ""
    speeds: dict[int, Speed] = field(default_factory=dict)
    memory: StepMemory | None = None
    failures: list[Failure] = field(default_factory=list)

    @property
    def seq_length(self) -> int:
        return self.config["trainer"]["seq_length"]

    @property
    def tokens_per_s(self) -> list[float]:
        return [speed.tokens_per_s for speed in self.speeds.values()]

    @property
    def loss(self) -> float | None:
        return next((speed.loss for speed in self.speeds.values()), None)


@dataclass
class Report:
    """A benchmark's rows, and where and how they came about.

    baseline: the scheme that the others are compared with. command: to run it again.
    """

    command: list[str]
    machine: dict[str, str]
    baseline: str
    rows: list[Row]

    def groups(self) -> list[list[Row]]:
        """The rows of each sweep point and world, which did the same work."""
        groups: dict[str, list[Row]] = {}
        for row in self.rows:
            groups.setdefault(json.dumps([row.point, row.world_size]), []).append(row)
        return list(groups.values())

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """The report that `to_json` wrote.

        Raises:
            ValueError: it is no such text.
        """
        try:
            tree = json.loads(text)
            if tree.pop("format") != FORMAT:
                raise KeyError(FORMAT)
            rows = [
                Row(
                    **{
                        **row,
                        "speeds": {int(n): Speed(**speed) for n, speed in row["speeds"].items()},
                        "memory": row["memory"] and StepMemory(**row["memory"]),
                        "failures": [Failure(**failure) for failure in row["failures"]],
                    }
                )
                for row in tree.pop("rows")
            ]
            return cls(**tree, rows=rows)
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError("not a result that `megatsp bench --json FILE` wrote") from error


def ratios(row: Row, base: Row) -> list[float]:
    """Speed relative to `base`, repeat by repeat: what drifts with time drifts in both."""
    pairs = [(speed, base.speeds[n]) for n, speed in row.speeds.items() if n in base.speeds]
    return [ours.tokens_per_s / theirs.tokens_per_s for ours, theirs in pairs]


def notes(row: Row, group: list[Row]) -> str:
    """What a reader must know of a row: why it has no numbers, or why to doubt them."""
    during: dict[str, list[str]] = {}
    for failure in row.failures:
        during.setdefault(failure.reason, []).append(failure.during)
    found = [f"{', '.join(which)}: {reason}" for reason, which in during.items()]
    if row.refused:
        found.append(row.refused)
    with_loss = next((other for other in group if other.loss is not None), None)
    if with_loss is not None and row.loss is not None:
        expected = with_loss.loss
        assert expected is not None
        worst = max((speed.loss for speed in row.speeds.values()), key=lambda loss: _distance(loss, expected))
        difference = _distance(worst, expected) / max(abs(expected), 1e-12)
        if not difference <= LOSS_TOLERANCE[row.config["trainer"]["dtype"]]:  # true of a NaN too
            found.append(f"LOSS DIFFERS from {with_loss.scheme}'s by {difference:.1e}")
    return "; ".join(" ".join(note.split()) for note in found)


def growth(rows: list[Row]) -> float | None:
    """x of the fit: time of a step ~ (its model FLOPs)^x; None where all steps have equal FLOPs."""
    points = []
    for row in rows:
        if row.speeds:
            tokens = row.config["trainer"]["global_batch_size"] * row.seq_length
            points.append(
                (math.log(tokens * row.flops_per_token), math.log(tokens / median(row.tokens_per_s)))
            )
    if len({flops for flops, _ in points}) < 2:
        return None
    return linear_regression(*zip(*points, strict=True)).slope


def _distance(loss: float, expected: float) -> float:
    return math.inf if math.isnan(loss) else abs(loss - expected)


def tflops(row: Row) -> float:
    """Model TFLOP/s of all ranks together."""
    return median(row.tokens_per_s) * row.flops_per_token / 1e12
