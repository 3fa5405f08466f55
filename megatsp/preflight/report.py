"""What a preflight found: as a table for people, as an object for programs."""

import statistics
from collections.abc import Iterator
from typing import Any

from megatsp.preflight.examine import Found, Kind


def table(found: Found, per_node: int, profile: str) -> Iterator[str]:
    """Lines: one for each kind of measurement, then the warnings. profile: whose expectations they are."""
    nodes = len(found.names)
    shape = f"{nodes} node{'s' * (nodes > 1)} of {per_node} rank{'s' * (per_node > 1)}"
    yield f"preflight: {shape}; measured here, expected by launch.profile={profile}"
    rows: list[tuple[str, ...]] = [("what", "where", "size", "lowest", "median", "unit", "expected")]
    rows += [_row(kind) for kind in found.kinds]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(
            text.ljust(n) if i in (0, 1, 5) else text.rjust(n)
            for i, (text, n) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
    for warning in found.verdict.warnings:
        yield f"warning: {warning}"


def _row(kind: Kind) -> tuple[str, ...]:
    values = [sample.value for sample in kind.samples]
    size = f"{kind.bytes / 2**20:.4g} MiB" if kind.bytes else ""
    expected = f"{kind.expected:.4g}" if kind.expected else "not known"
    lowest, median = f"{min(values):.4g}", f"{statistics.median_high(values):.4g}"
    return kind.what, kind.where, size, lowest, median, kind.samples[0].unit, expected


def as_json(found: Found) -> dict[str, Any]:
    """All of it. expected: null where it is not known."""
    choice = found.choice
    return {
        "enough": choice is not None,
        "nodes": choice.chosen if choice else [],
        "spares": choice.spares if choice else [],
        "replaced": dict(choice.replaced) if choice else {},
        "bad": found.verdict.bad,
        "warnings": found.verdict.warnings,
        "unclear": found.verdict.unclear,
        "measurements": [
            {
                "what": kind.what, "where": kind.where, "bytes": kind.bytes, "unit": kind.samples[0].unit,
                "expected": kind.expected or None,
                "measured": [
                    {
                        "value": sample.value, "right": sample.right,
                        "devices": [[place.node, place.device] for place in sample.places],
                    }
                    for sample in kind.samples
                ],
            }
            for kind in found.kinds
        ],
    }  # fmt: skip
